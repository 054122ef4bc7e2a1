-- checks/unscored_rollouts.sql
-- grain: one row per rollout that is to be graded and has no verdict. Zero rows = pass.
-- reads: rollouts, scores, round_prompts. parameters: $k.
select r.rollout_id as id, r.prompt_id
from rollouts as r
inner join round_prompts as p on p.prompt_id = r.prompt_id and p.source_round = r.round
left join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
where r.sample < $k and s.id is null
order by id
