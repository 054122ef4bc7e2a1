-- report/metrics.sql
-- grain: one row per (name, round, step). reads: metrics, evals. $names: metrics wanted.
-- x: optimizer updates done in the whole run when the step ended. A round's length is what its metrics or evals show.
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
    metrics.name,
    metrics.round,
    metrics.step,
    cast(starts.before + metrics.step + 1 as bigint) as x,
    metrics.value
from metrics
inner join starts using (round)
where list_contains($names, metrics.name) and isfinite(metrics.value)
order by name, round, step
