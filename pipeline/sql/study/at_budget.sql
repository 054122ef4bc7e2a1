-- study/at_budget.sql
-- grain: one row per (run, suite): the newest evaluated policy that had cost at most the world's budget of generated tokens.
-- reads: evals, rollouts, cells. A result without rollouts in a round has spent nothing in it. No budget: no row.
with spent as (
    select run, round, sum(length) as tokens
    from rollouts
    group by run, round
),

policies as (
    select distinct run, round, step
    from evals
),

costs as (
    select
        policies.run,
        policies.round,
        policies.step,
        coalesce(sum(spent.tokens), 0) as tokens
    from policies
    left join spent on spent.run = policies.run and spent.round <= policies.round and (policies.round, policies.step) <> (0, 0)
    group by all
)

select
    cells.world,
    cells.base,
    cells.method,
    cells.seed,
    evals.suite,
    arg_max(evals.value, (evals.round, evals.step)) as value,
    max(evals.round) as round,
    cast(max(costs.tokens) as bigint) as tokens
from evals
inner join cells using (run)
inner join costs using (run, round, step)
where evals.metric like 'avg@%' and costs.tokens <= cells.rollout_tokens
group by all
order by all
