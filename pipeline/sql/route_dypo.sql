-- route_dypo.sql
-- grain: one row per sequence to train on: each rollout of a prompt whose reason is rl, each fitting trace of one whose reason is sft.
-- reads: grades, verdicts (verdicts.sql), fitting_traces. parameters: $round, $max_tokens, $advantage_scale ('std' or 'none'), $eps.
-- Keys, no token lists: sequences.sql joins those by item_id afterwards.
-- The advantage is trainer.losses.grpo_advantages in SQL (std over k - 1, equal rewards give 0); a test holds the two together.
-- Its sums run over the sorted rewards, so that their last digits do not hang on the number of threads.
-- Weights are gates (0 or 1): alpha, gamma and denominators are the trainer's, so changing those does not re-route.
with gated as (
    select g.round, g.source_round, g.policy, v.*
    from verdicts as v
    inner join (select prompt_id, round, source_round, policy from grades where round = $round and reason = 'rl') as g
        on g.prompt_id = v.prompt_id
),
-- a truncated or unreadable answer has no reward of its own: the group's lowest, never more than a wrong one
lowest as (
    select prompt_id, least(0.0, min(reward)) as reward
    from gated
    group by prompt_id
    having not bool_and(status in ('ok', 'wrong'))
),
mid as (
    select g.* replace (case when g.status in ('ok', 'wrong') then g.reward else l.reward end as reward)
    from gated as g
    left join lowest as l on l.prompt_id = g.prompt_id
),
groups as (
    select
        prompt_id,
        list_avg(rewards) as mean,
        list_stddev_samp(rewards) as std,
        rewards[1] = rewards[-1] as flat,
        cast(len(rewards) as integer) as size
    from (select prompt_id, list_sort(list(reward)) as rewards from mid group by prompt_id)
),
hard as (
    select g.round, g.source_round, g.policy, t.*
    from grades as g
    inner join fitting_traces as t on t.prompt_id = g.prompt_id
    where g.round = $round and g.reason = 'sft' and t.n_tokens <= $max_tokens
)
select
    m.round, m.source_round, 'rl' as route, m.prompt_id, m.rollout_id as item_id, m.sample, cast(null as varchar) as teacher,
    m.policy, m.temperature, m.finish_reason, m.reward, m.correct,
    case
        when g.flat then 0e0
        when $advantage_scale = 'std' then (m.reward - g.mean) / (g.std + $eps)
        else m.reward - g.mean
    end as advantage,
    g.size as group_size, 0e0 as w_sft, 1e0 as w_grpo, 1e0 as w_gal
from mid as m
inner join groups as g on g.prompt_id = m.prompt_id
union all
select
    round, source_round, 'sft' as route, prompt_id, trace_id as item_id, sample, teacher,
    policy, 1e0 as temperature, finish_reason, reward, true as correct,
    0e0 as advantage, 1 as group_size, 1e0 as w_sft, 0e0 as w_grpo, 0e0 as w_gal
from hard
order by route, prompt_id, sample, item_id
