-- curriculum/transition.sql
-- grain: one row per prompt graded in $round: the weight that its gate is multiplied by.
-- reads: grades, earlier_grades (those of the rounds before). parameters: $round.
-- By how the grade moved since the prompt was last graded on rollouts of its own: 2 where it got harder (what was known is being
-- forgotten), 0.5 where it was Hard and still is (training on it has not helped so far), 1 otherwise and where it is new. A grade
-- on reused rollouts is that of their round (source_round), so what it moved from stands in the rounds before that one.
with last as (
    select e.prompt_id, arg_max(e.grade, e.round) as grade
    from earlier_grades as e
    join grades as g on g.prompt_id = e.prompt_id and g.round = $round
    where e.source_round = e.round and e.round < g.source_round
    group by e.prompt_id
),
levels as (
    select g.prompt_id, list_position(['easy', 'mid', 'hard'], g.grade) as now, list_position(['easy', 'mid', 'hard'], l.grade) as before
    from grades as g
    left join last as l on l.prompt_id = g.prompt_id
    where g.round = $round
)
select
    prompt_id,
    case when now > before then 2e0 when now = 3 and before = 3 then 0.5e0 else 1e0 end as weight
from levels
order by prompt_id
