-- report/verifier_status.sql
-- grain: one row per (kind, teacher, suite, round, step, status). reads: scores.
select
    kind,
    teacher,
    suite,
    round,
    step,
    status,
    count(*) as verdicts
from scores
group by all
order by kind, teacher, suite, round, step, status
