-- adjust/teacher_by_round.sql
-- grain: one row per row of `routed` but the traces of all teachers of a prompt except one: the next in each round, by name.
-- reads: routed. parameters: $round.
with teachers as (
    select prompt_id, list_sort(list(distinct teacher)) as names
    from routed
    where route = 'sft'
    group by prompt_id
)
select r.*
from routed as r
left join teachers as t on t.prompt_id = r.prompt_id
where r.route <> 'sft' or r.teacher = t.names[1 + $round % len(t.names)]
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
