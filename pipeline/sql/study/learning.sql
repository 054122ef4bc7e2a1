-- study/learning.sql
-- grain: one row per (world, method, rounds): the tuning suite along training, mean over results. reads: evals, cells. $suite: its name.
-- rounds: of training that the policy has had; 0 is the base. half: of the 95 % interval of the mean, from the normal.
select
    cells.world,
    cells.method,
    case when evals.round = 0 and evals.step = 0 then 0 else evals.round + 1 end as rounds,
    avg(evals.value) as value,
    1.96 * stddev_samp(evals.value) / sqrt(count(*)) as half,
    count(*) as results
from evals
inner join cells using (run)
where evals.suite = $suite and evals.metric like 'avg@%'
group by all
order by all
