-- report/eval_problems.sql
-- grain: one row per (suite, round, step, prompt_id). reads: evals, eval_rollouts, scores (kind = eval).
-- What avg@n and pass@k average over: kept by problem, so that two checkpoints can be compared on the same problems.
-- Only the first n samples count, n being the one in the metric's name: a suite whose n was lowered keeps the others' rows.
with sizes as (
    select
        suite,
        round,
        step,
        max(cast(regexp_extract(metric, '^avg@([0-9]+)$', 1) as integer)) as n
    from evals
    where regexp_matches(metric, '^avg@[0-9]+$')
    group by all
)

select
    r.suite,
    r.round,
    r.step,
    r.prompt_id,
    count(*) as samples,
    count(*) filter (s.correct) as correct
from eval_rollouts as r
inner join scores as s on s.kind = 'eval' and s.id = r.rollout_id
inner join sizes on sizes.suite = r.suite and sizes.round = r.round and sizes.step = r.step
where r.sample < sizes.n
group by all
order by r.suite, r.round, r.step, r.prompt_id
