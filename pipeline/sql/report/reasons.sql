-- report/reasons.sql
-- grain: one row per (round, reason, grade). reads: grades.
select
    round,
    reason,
    grade,
    count(*) as prompts
from grades
group by all
order by round, reason, grade
