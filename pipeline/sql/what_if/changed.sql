-- what_if/changed.sql
-- grain: one row per prompt whose grade or reason is another one.
-- reads: grades_now, grades_then. parameters: none.
select
    coalesce(n.prompt_id, t.prompt_id) as prompt_id,
    n.successes as successes_now,
    n.grade as grade_now,
    n.reason as reason_now,
    t.successes as successes_then,
    t.grade as grade_then,
    t.reason as reason_then
from grades_now as n
full join grades_then as t on t.prompt_id = n.prompt_id
where n.grade is distinct from t.grade or n.reason is distinct from t.reason
order by prompt_id
