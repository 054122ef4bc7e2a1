-- route_dypo.sql
-- grain: one row per sequence to train on: each rollout of a prompt whose reason is rl, each fitting trace of one whose reason is sft.
-- reads: grades, rollouts, scores, fitting_traces.
-- parameters: $round, $k, $max_tokens, $advantage_scale ('std' or 'none'), $eps.
-- The advantage is trainer.losses.grpo_advantages in SQL (std over k - 1, equal rewards give 0); a test holds the two together.
-- Weights are gates (0 or 1): alpha, gamma and denominators are the trainer's, so changing those does not re-route.
with mid as (
    select
        g.round,
        g.source_round,
        r.prompt_id,
        r.rollout_id as item_id,
        r.sample,
        g.policy,
        r.temperature,
        r.prompt_tokens,
        r.tokens,
        r.logprobs as old_logprobs,
        r.finish_reason,
        -- a truncated or unreadable answer has no reward of its own: the group's lowest, never more than a wrong one
        case when s.status in ('ok', 'wrong') then s.reward else least(0.0, min(s.reward) over grp) end as reward,
        s.correct
    from grades as g
    inner join rollouts as r on r.round = g.source_round and r.prompt_id = g.prompt_id and r.sample < $k
    inner join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
    where g.round = $round and g.reason = 'rl'
    window grp as (
        partition by r.prompt_id order by r.sample
        rows between unbounded preceding and unbounded following
    )
),
mid_with_advantage as (
    select
        *,
        reward - avg(reward) over grp as centred,
        stddev_samp(reward) over grp as std,
        max(reward) over grp = min(reward) over grp as flat,
        cast(count(*) over grp as integer) as group_size
    from mid
    window grp as (
        partition by prompt_id order by sample
        rows between unbounded preceding and unbounded following
    )
),
hard as (
    select g.round, g.source_round, g.policy, t.*
    from grades as g
    inner join fitting_traces as t on t.prompt_id = g.prompt_id
    where g.round = $round and g.reason = 'sft' and t.n_tokens <= $max_tokens
)
select
    round, source_round, 'rl' as route, prompt_id, item_id, sample, cast(null as varchar) as teacher, policy, temperature,
    prompt_tokens, tokens, old_logprobs, finish_reason, reward, correct,
    case when flat then 0e0 when $advantage_scale = 'std' then centred / (std + $eps) else centred end as advantage,
    group_size, 0e0 as w_sft, 1e0 as w_grpo, 1e0 as w_gal
from mid_with_advantage
union all
select
    round, source_round, 'sft' as route, prompt_id, trace_id as item_id, sample, teacher, policy, 1e0 as temperature,
    prompt_tokens, tokens, null as old_logprobs, finish_reason, reward, true as correct,
    0e0 as advantage, 1 as group_size, 1e0 as w_sft, 0e0 as w_grpo, 0e0 as w_gal
from hard
order by route, prompt_id, sample, item_id
