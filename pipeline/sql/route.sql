-- route.sql
-- grain: one row per sequence to train on: each rollout of a prompt whose group the method takes, each fitting trace that it takes.
-- reads: grades, verdicts (verdicts.sql), fitting_traces, ratings. parameters: $round, $max_tokens, $policy (of the round), the method's
-- routing (schemas/methods/): $rl and $sft (lists of grades), $union, $graded (false: a round without rollouts), $min_pass_rate and
-- $max_pass_rate (of the groups), $rated (a rollout's reward is its rating), $advantage ('std' or 'none'), $eps.
-- Keys, no token lists: sequences.sql joins those by item_id afterwards.
-- The advantage is trainer.losses.grpo_advantages in SQL (std over k - 1, equal rewards give 0); a test holds the two together.
-- Its sums run over the sorted rewards, so that their last digits do not hang on the number of threads.
-- Weights are gates (0 or 1): alpha, gamma and denominators are the trainer's, so changing those does not re-route.
with gates as (
    select
        prompt_id, round, source_round, policy, reason,
        -- decimals: a rate of 0.2 is 2 of 10, to the count
        successes between cast($min_pass_rate as decimal(9, 6)) * k and cast($max_pass_rate as decimal(9, 6)) * k as passes,
        case reason when 'rl' then 'mid' when 'sft' then 'hard' when 'easy' then 'easy' else grade end as gate
    from grades
    where round = $round and reason not in ('unjudged', 'incomplete_group', 'stale')
),
gated as (
    select g.round, g.source_round, g.policy, v.*
    from verdicts as v
    inner join (
        select * from gates
        where passes and list_contains($rl, gate) and not (gate = 'mid' and reason = 'too_long')
    ) as g on g.prompt_id = v.prompt_id
),
-- a truncated or unreadable answer has no reward of its own: the group's lowest, never more than a wrong one
lowest as (
    select prompt_id, least(0.0, min(reward)) as reward
    from gated
    group by prompt_id
    having not bool_and(status in ('ok', 'wrong'))
),
rollout as (
    select g.* replace (case
        when $rated then t.score
        when g.status in ('ok', 'wrong') then g.reward
        else l.reward
    end as reward)
    from gated as g
    left join lowest as l on l.prompt_id = g.prompt_id
    left join (select * from ratings where $rated and round = $round and kind = 'rollout') as t on t.item_id = g.rollout_id
    where not $rated or t.item_id is not null
),
traces as (
    select * from fitting_traces where n_tokens <= $max_tokens
),
-- with union the prompt's trace is one more member of its group; of several, the mean of their rewards stands for the one drawn
member as (
    select prompt_id, list_avg(list_sort(list(reward))) as reward
    from traces
    where $union
    group by prompt_id
),
groups as (
    select
        prompt_id,
        list_avg(rewards) as mean,
        list_stddev_samp(rewards) as std,
        rewards[1] = rewards[-1] as flat,
        cast(len(rewards) as integer) as size
    from (
        select
            r.prompt_id,
            case when m.reward is null then r.rewards else list_sort(list_append(r.rewards, m.reward)) end as rewards
        from (
            select prompt_id, list_sort(list(reward)) as rewards
            from rollout
            group by prompt_id
            having max(n_tokens) <= $max_tokens
        ) as r
        left join member as m on m.prompt_id = r.prompt_id
    )
),
supervised as (
    select
        coalesce(g.round, $round) as round,
        coalesce(g.source_round, $round) as source_round,
        coalesce(g.policy, $policy) as policy,
        not $graded or coalesce(list_contains($sft, g.gate), false) as taught,
        t.*
    from traces as t
    left join gates as g on g.prompt_id = t.prompt_id
)
select
    r.round, r.source_round, 'rl' as route, r.prompt_id, r.rollout_id as item_id, r.sample, cast(null as varchar) as teacher,
    r.policy, r.temperature, r.finish_reason, r.reward, r.correct,
    case
        when g.flat then 0e0
        when $advantage = 'std' then (r.reward - g.mean) / (g.std + $eps)
        else r.reward - g.mean
    end as advantage,
    g.size as group_size, 0e0 as w_sft, 1e0 as w_grpo, 1e0 as w_gal
from rollout as r
inner join groups as g on g.prompt_id = r.prompt_id
union all
select
    s.round, s.source_round, 'sft' as route, s.prompt_id, s.trace_id as item_id, s.sample, s.teacher,
    s.policy, 1e0 as temperature, s.finish_reason, s.reward, true as correct,
    case
        when g.prompt_id is null or g.flat then 0e0
        when $advantage = 'std' then (s.reward - g.mean) / (g.std + $eps)
        else s.reward - g.mean
    end as advantage,
    coalesce(g.size, 1) as group_size, case when s.taught then 1e0 else 0e0 end as w_sft,
    case when g.prompt_id is null then 0e0 else 1e0 end as w_grpo, 0e0 as w_gal
from supervised as s
left join (select * from groups where $union) as g on g.prompt_id = s.prompt_id
where s.taught or g.prompt_id is not null
order by route, prompt_id, sample, item_id
