-- adjust/earlier_rollouts.sql
-- grain: one row per row of `routed`, and per rollout of a routed group's prompt that one of the two rounds before drew: a member of the
-- group, weighed against its own sampler's stored log-probs by the importance ratio. Advantages are over the whole group.
-- reads: routed, rollouts, scores. parameters: $round, $advantage ('std' or 'none'), $eps, $max_tokens.
with groups as (
    select prompt_id, min(source_round) as source_round, min(reward) as lowest, any_value(w_grpo) as w_grpo, any_value(w_gal) as w_gal
    from routed
    where route = 'rl'
    group by prompt_id
),
earlier as (
    select
        r.round as source_round, r.prompt_id, r.rollout_id as item_id, r.sample, r.policy, r.temperature, r.finish_reason,
        -- a truncated or unreadable answer has no reward of its own: the group's lowest, never more than a wrong one
        case when s.status in ('ok', 'wrong') then s.reward else least(0.0, g.lowest) end as reward,
        s.correct, g.w_grpo, g.w_gal
    from rollouts as r
    inner join groups as g on g.prompt_id = r.prompt_id
    inner join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
    where r.round between $round - 2 and $round - 1
        and r.round <> g.source_round
        and r.prompt_length + r.length <= $max_tokens
        and s.status not in ('timeout', 'error', 'gold_bad')
),
joined as (
    select * from routed
    union all by name
    select
        cast($round as integer) as round, source_round, 'rl' as route, prompt_id, item_id, sample, cast(null as varchar) as teacher,
        policy, temperature, finish_reason, reward, correct, 0e0 as advantage, cast(0 as integer) as group_size, 0e0 as w_sft, w_grpo, w_gal
    from earlier
),
whole as (
    select
        prompt_id, list_avg(rewards) as mean, list_stddev_samp(rewards) as std, rewards[1] = rewards[-1] as flat,
        cast(len(rewards) as integer) as size
    from (select prompt_id, list_sort(list(reward)) as rewards from joined where route = 'rl' group by prompt_id)
)
select
    j.* replace (
        case
            when j.route <> 'rl' then j.advantage
            when w.flat then 0e0
            when $advantage = 'std' then (j.reward - w.mean) / (w.std + $eps)
            else j.reward - w.mean
        end as advantage,
        case when j.route = 'rl' then w.size else j.group_size end as group_size
    )
from joined as j
left join whole as w on w.prompt_id = j.prompt_id
order by j.route, j.prompt_id, j.source_round, j.sample, j.item_id
