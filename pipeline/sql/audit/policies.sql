-- audit/policies.sql
-- grain: one row per policy that sampled rollouts of the round's rl shard.
-- reads: compared (audit/compared.sql).
-- parameters: $round.
-- How far the sampler's log-probs are from the trainer's. The weight of a token is exp(trainer - sampler), of a row its product;
-- a weight's greatest logarithm is taken off before exp, which leaves the effective sample size (sum w)^2 / (n sum w^2) as it is.
with tokens as (
    select
        *,
        trainer - sampler as gap,
        exp(trainer - sampler - max(trainer - sampler) over (partition by policy)) as weight
    from compared
    where round = $round
),
by_token as (
    select
        policy,
        count(distinct item_id) as rows,
        count(*) as tokens,
        avg(abs(gap)) as mean_difference,
        max(abs(gap)) as max_difference,
        avg(exp(least(gap, 20)) - 1 - gap) as kl,
        sum(weight) ** 2 / (count(*) * sum(weight ** 2)) as ess
    from tokens
    group by policy
),
row_gaps as (
    select policy, item_id, sum(gap) as gap
    from tokens
    group by policy, item_id
),
row_weights as (
    select policy, exp(gap - max(gap) over (partition by policy)) as weight
    from row_gaps
),
by_row as (
    select policy, sum(weight) ** 2 / (count(*) * sum(weight ** 2)) as ess_sequence
    from row_weights
    group by policy
)
select t.policy, t.rows, t.tokens, t.mean_difference, t.max_difference, t.kl, t.ess, r.ess_sequence
from by_token as t
inner join by_row as r on r.policy = t.policy
order by t.policy
