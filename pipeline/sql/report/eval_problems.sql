-- report/eval_problems.sql
-- grain: one row per (suite, round, step, prompt_id). reads: scores (kind = eval).
-- What avg@n and pass@k average over: kept by problem, so that two checkpoints can be compared on the same problems.
select
    suite,
    round,
    step,
    prompt_id,
    count(*) as samples,
    count(*) filter (correct) as correct
from scores
where kind = 'eval'
group by all
order by suite, round, step, prompt_id
