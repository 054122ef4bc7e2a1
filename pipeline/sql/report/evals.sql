-- report/evals.sql
-- grain: one row per (suite, metric, round, step). reads: evals, metrics.
-- x: optimizer updates that the evaluated policy has had in the whole run.
with lengths as (
    select round, max(updates) as updates
    from (
        select round, step + 1 as updates from metrics
        union all
        select round, step as updates from evals
    )
    group by round
),

starts as (
    select
        round,
        coalesce(sum(updates) over (order by round rows between unbounded preceding and 1 preceding), 0) as before
    from lengths
)

select
    evals.suite,
    evals.metric,
    evals.round,
    evals.step,
    cast(starts.before + evals.step as bigint) as x,
    evals.value,
    evals.ci_low,
    evals.ci_high,
    evals.problems,
    evals.policy
from evals
inner join starts using (round)
order by suite, metric, round, step
