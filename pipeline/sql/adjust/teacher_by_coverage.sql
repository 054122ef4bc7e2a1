-- adjust/teacher_by_coverage.sql
-- grain: one row per row of `routed` but the traces of all teachers of a prompt except one: who has verified traces of most prompts
-- of the round, of equals the first by name.
-- reads: routed, coverage (teacher, prompts: of the whole round). parameters: none.
with chosen as (
    select r.prompt_id, arg_min(r.teacher, (-c.prompts, r.teacher)) as teacher
    from routed as r
    inner join coverage as c on c.teacher = r.teacher
    where r.route = 'sft'
    group by r.prompt_id
)
select r.*
from routed as r
left join chosen as c on c.prompt_id = r.prompt_id
where r.route <> 'sft' or r.teacher = c.teacher
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
