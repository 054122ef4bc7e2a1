-- coverage.sql
-- grain: one row per teacher: of how many prompts of the round it has verified traces.
-- reads: fitting_traces. parameters: none.
select teacher, count(distinct prompt_id) as prompts
from fitting_traces
group by teacher
