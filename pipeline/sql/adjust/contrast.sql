-- adjust/contrast.sql
-- grain: one row per row of `routed` but the groups whose rewards are all the same, which have no gradient and would take up a step's
-- prompts (DAPO's dynamic sampling, for any method that takes every group).
-- reads: routed. parameters: none.
with flat as (
    select prompt_id
    from routed
    where route = 'rl'
    group by prompt_id
    having min(reward) = max(reward)
)
select *
from routed
where route <> 'rl' or prompt_id not in (select prompt_id from flat)
order by route, prompt_id, source_round, sample, item_id
