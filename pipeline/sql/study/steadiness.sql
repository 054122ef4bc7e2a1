-- study/steadiness.sql
-- grain: one row per run: how its gradient's norm varied over its steps, and its offline ratio in the first and the last round.
-- reads: metrics, cells. The variation is the standard deviation over the mean, so a loss's scale has no part in it.
with of_run as (
    select
        run,
        stddev_samp(value) filter (where name = 'grad_norm') / avg(value) filter (where name = 'grad_norm') as variation,
        avg(value) filter (where name = 'offline_ratio' and round = 0) as offline_first,
        avg(value) filter (where name = 'offline_ratio' and round = last) as offline_last
    from (select *, max(round) over (partition by run) as last from metrics)
    where name in ('grad_norm', 'offline_ratio') and isfinite(value)
    group by run
)

select
    cells.world,
    cells.base,
    cells.method,
    cells.seed,
    of_run.variation,
    of_run.offline_first,
    of_run.offline_last
from of_run
inner join cells using (run)
order by all
