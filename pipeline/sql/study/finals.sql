-- study/finals.sql
-- grain: one row per (run, suite): what a result is after its last round. reads: evals, cells.
-- evals: of all runs, with their names in `run`. cells: one row for each finished result (run, world, base, method, seed).
select
    cells.world,
    cells.base,
    cells.method,
    cells.seed,
    evals.suite,
    arg_max(evals.value, (evals.round, evals.step)) as value,
    arg_min(evals.value, (evals.round, evals.step)) as before
from evals
inner join cells using (run)
where evals.metric like 'avg@%'
group by all
order by all
