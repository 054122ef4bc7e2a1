-- checks/unscored.sql
-- grain: one row per rollout of $round, or trace of one of its prompts, without a verdict. Zero rows = pass.
-- reads: rollouts, traces, scores, round_prompts.
select 'rollout' as kind, r.rollout_id as id, r.prompt_id
from rollouts as r
inner join round_prompts as p on p.prompt_id = r.prompt_id
left join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
where r.round = $round and s.id is null
union all
select 'trace' as kind, t.trace_id as id, t.prompt_id
from traces as t
inner join round_prompts as p on p.prompt_id = t.prompt_id
left join scores as s on s.kind = 'trace' and s.id = t.trace_id
where s.id is null
order by kind, id
