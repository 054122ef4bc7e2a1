-- adjust/leave_one_out.sql
-- grain: one row per row of `routed`: the same, a rollout's advantage being its reward minus the mean of the group's other rewards.
-- reads: routed. parameters: none.
-- RLOO: what a rollout is compared with does not hang on the rollout itself, so the estimate is unbiased; not divided by a std.
-- Equal rewards give exact zeros. The sum is over sorted rewards, so that its last digits do not hang on the number of threads.
with groups as (
    select prompt_id, count(*) as k, list_sum(list_sort(list(reward))) as total, min(reward) = max(reward) as flat
    from routed
    where route = 'rl'
    group by prompt_id
)
select
    r.* replace (case
        when r.route <> 'rl' then r.advantage
        when g.flat then 0e0
        else r.reward - (g.total - r.reward) / (g.k - 1)
    end as advantage)
from routed as r
left join groups as g on g.prompt_id = r.prompt_id
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
