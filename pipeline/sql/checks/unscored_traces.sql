-- checks/unscored_traces.sql
-- grain: one row per trace of a prompt of the round without a verdict. Zero rows = pass.
-- reads: traces, scores, round_prompts. parameters: none.
select t.trace_id as id, t.prompt_id
from traces as t
inner join round_prompts as p on p.prompt_id = t.prompt_id
left join scores as s on s.kind = 'trace' and s.id = t.trace_id
where s.id is null
order by id
