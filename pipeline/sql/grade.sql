-- grade.sql
-- grain: one row per prompt of $round that has rollouts, its own or those of an older round that stand for them.
-- reads: verdicts (verdicts.sql), round_prompts (round_prompts.sql), fitting_traces (verified traces, tokenised with the policy's tokenizer; column n_tokens).
-- parameters: $round, $k, $hard_max_successes, $easy_max_failures, $max_tokens, $unjudged_to_routes.
-- Integer success counts decide, never a reward or a float: a shaped reward must not move a prompt between grades.
-- A verdict that could not be had counts as not correct, but its group is routed nowhere unless the recipe says otherwise.
with groups as (
    select
        prompt_id,
        min(policy) as policy,
        cast(count(*) as integer) as k,
        cast(count(*) filter (where correct) as integer) as successes,
        cast(count(*) filter (where status in ('timeout', 'error', 'gold_bad')) as integer) as unjudged,
        max(n_tokens) as longest
    from verdicts
    group by prompt_id
),
verified as (
    select
        prompt_id,
        cast(count(*) filter (where n_tokens <= $max_tokens) as integer) as fitting,
        count(*) as found
    from fitting_traces
    group by prompt_id
),
graded as (
    select
        g.*,
        case
            when g.k < $k and p.decided is not null then p.decided
            when g.successes <= $hard_max_successes then 'hard'
            when g.k - g.successes <= $easy_max_failures then 'easy'
            else 'mid'
        end as grade,
        coalesce(v.fitting, 0) as traces,
        coalesce(v.found, 0) as found,
        p.source_round,
        p.stale,
        g.k < $k and p.decided is null as incomplete
    from groups as g
    inner join round_prompts as p on p.prompt_id = g.prompt_id
    left join verified as v on v.prompt_id = g.prompt_id
)
select
    prompt_id,
    cast($round as integer) as round,
    source_round,
    policy,
    k,
    successes,
    unjudged,
    grade,
    traces,
    case
        when stale then 'stale'
        when incomplete then 'incomplete_group'
        when unjudged > 0 and not $unjudged_to_routes then 'unjudged'
        when grade = 'easy' then 'easy'
        when grade = 'mid' and longest <= $max_tokens then 'rl'
        when grade = 'mid' then 'too_long'
        when traces > 0 then 'sft'
        when found > 0 then 'too_long'
        else 'no_verified_trace'
    end as reason
from graded
order by prompt_id
