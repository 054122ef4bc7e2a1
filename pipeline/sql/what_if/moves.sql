-- what_if/moves.sql
-- grain: one row per (grade and reason now, grade and reason then) that some prompt has.
-- reads: grades_now, grades_then, shards_now, shards_then (lengths.sql of two gradings of one round, neither of them stored by this query).
-- parameters: none.
with trained_now as (select prompt_id, sum(length) as tokens from shards_now group by prompt_id),
trained_then as (select prompt_id, sum(length) as tokens from shards_then group by prompt_id)
select
    n.grade as grade_now,
    n.reason as reason_now,
    t.grade as grade_then,
    t.reason as reason_then,
    count(*) as prompts,
    cast(coalesce(sum(a.tokens), 0) as bigint) as tokens_now,
    cast(coalesce(sum(b.tokens), 0) as bigint) as tokens_then
from grades_now as n
full join grades_then as t on t.prompt_id = n.prompt_id
left join trained_now as a on a.prompt_id = n.prompt_id
left join trained_then as b on b.prompt_id = t.prompt_id
group by all
order by all
