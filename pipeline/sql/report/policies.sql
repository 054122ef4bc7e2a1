-- report/policies.sql
-- grain: one row per (policy, use); use says what the policy was run for. reads: rollouts, evals.
-- Rollouts of round r + 1 come from the checkpoint that round r ended with, so they sort after its evals.
select
    policy,
    format('rollouts of round {}', round) as use,
    round,
    -1 as step
from rollouts
group by all
union all
select
    policy,
    format('evals after step {} of round {}', step, round) as use,
    round,
    step
from evals
group by all
order by round, step, policy
