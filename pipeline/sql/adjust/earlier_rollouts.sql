-- adjust/earlier_rollouts.sql
-- grain: one row per row of `routed`, and per rollout of a routed group's prompt that one of the two rounds before drew: a member of the
-- group, weighed against its own sampler's stored log-probs by the importance ratio. Advantages are over the whole group.
-- reads: routed, rollouts, scores. parameters: $round, $k, $advantage ('std' or 'none'), $eps, $max_tokens.
-- What a round drew of a prompt is taken whole, as route.sql takes a group: all of it judged, and none too long.
with groups as (
    select prompt_id, min(source_round) as source_round, any_value(w_grpo) as w_grpo, any_value(w_gal) as w_gal
    from routed
    where route = 'rl'
    group by prompt_id
),
drawn as (
    select
        r.round as source_round, r.prompt_id, r.rollout_id as item_id, r.sample, r.policy, r.temperature, r.finish_reason,
        r.prompt_length + r.length as n_tokens, s.status, s.reward, s.correct, g.source_round as own_round, g.w_grpo, g.w_gal
    from rollouts as r
    inner join groups as g on g.prompt_id = r.prompt_id
    inner join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
    where (r.round = g.source_round or r.round between $round - 2 and $round - 1) and r.sample < $k
),
whole as (
    select prompt_id, source_round
    from drawn
    group by prompt_id, source_round
    having source_round = any_value(own_round)
        or (max(n_tokens) <= $max_tokens and count(*) filter (where status in ('timeout', 'error', 'gold_bad')) = 0)
),
members as (
    select d.* from drawn as d
    inner join whole as w on w.prompt_id = d.prompt_id and w.source_round = d.source_round
),
-- a truncated or unreadable answer has no reward of its own: the enlarged group's lowest, never more than a wrong one
lowest as (
    select prompt_id, least(0.0, min(reward)) as reward
    from members
    group by prompt_id
),
rewarded as (
    select m.* replace (case when m.status in ('ok', 'wrong') then m.reward else l.reward end as reward)
    from members as m
    inner join lowest as l on l.prompt_id = m.prompt_id
),
enlarged as (
    select
        prompt_id, list_avg(rewards) as mean, list_stddev_samp(rewards) as std, rewards[1] = rewards[-1] as flat,
        cast(len(rewards) as integer) as size
    from (select prompt_id, list_sort(list(reward)) as rewards from rewarded group by prompt_id)
)
select * from routed where route <> 'rl'
union all by name
select
    cast($round as integer) as round, m.source_round, 'rl' as route, m.prompt_id, m.item_id, m.sample, cast(null as varchar) as teacher,
    m.policy, m.temperature, m.finish_reason, m.reward, m.correct,
    case
        when e.flat then 0e0
        when $advantage = 'std' then (m.reward - e.mean) / (e.std + $eps)
        else m.reward - e.mean
    end as advantage,
    e.size as group_size, 0e0 as w_sft, m.w_grpo, m.w_gal
from rewarded as m
inner join enlarged as e on e.prompt_id = m.prompt_id
order by route, prompt_id, source_round, sample, item_id
