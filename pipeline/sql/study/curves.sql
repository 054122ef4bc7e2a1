-- study/curves.sql
-- grain: one row per (world, method, name, x): a metric of training, mean over results. reads: metrics, cells. $names: metrics wanted.
-- x: optimizer updates done when the step ended. half: of the 95 % interval of the mean, from the normal; null for a single result.
with lengths as (
    select run, round, max(step) + 1 as updates
    from metrics
    group by run, round
),

starts as (
    select
        run,
        round,
        coalesce(sum(updates) over (partition by run order by round rows between unbounded preceding and 1 preceding), 0) as before
    from lengths
)

select
    cells.world,
    cells.method,
    metrics.name,
    cast(starts.before + metrics.step + 1 as bigint) as x,
    avg(metrics.value) as value,
    1.96 * stddev_samp(metrics.value) / sqrt(count(*)) as half,
    count(*) as results
from metrics
inner join starts using (run, round)
inner join cells using (run)
where list_contains($names, metrics.name) and isfinite(metrics.value)
group by all
order by all
