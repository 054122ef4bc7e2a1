-- adjust/posterior.sql
-- grain: one row per row of `routed`: the same, its gates multiplied by how sure the grade is.
-- reads: routed, grades, earlier_grades. parameters: $round, $k.
-- Of a prompt's pass rate p, from a uniform prior and all its graded rollouts of this round and the rounds before: n of them, s right.
-- A trace is weighed by P(p < 1 / (k + 1)), a group by what is left of both ends. P(p < t) is P(X > s) of X ~ Binomial(n + 1, t).
-- So that a prompt on the border is supervised in part, name its grade in train.method.supervise too.
with seen as (
    select prompt_id, k, successes from grades where round = $round
    union all
    select prompt_id, k, successes from earlier_grades where round < $round and source_round = round
),
counts as (
    select g.prompt_id, cast(sum(s.k) as integer) as n, cast(sum(s.successes) as integer) as s
    from (select prompt_id from grades where round = $round) as g
    inner join seen as s on s.prompt_id = g.prompt_id
    group by g.prompt_id
),
tails as (
    select
        prompt_id,
        1 - list_sum(list_transform(range(0, s + 1), lambda i: exp(
            lgamma(n + 2) - lgamma(i + 1) - lgamma(n + 2 - i) - (n + 1) * ln($k + 1e0) + (n + 1 - i) * ln($k + 0e0)
        ))) as hard,
        1 - list_sum(list_transform(range(0, n - s + 1), lambda i: exp(
            lgamma(n + 2) - lgamma(i + 1) - lgamma(n + 2 - i) - (n + 1) * ln($k + 1e0) + (n + 1 - i) * ln($k + 0e0)
        ))) as easy
    from counts
)
select
    r.* replace (
        r.w_sft * greatest(t.hard, 0) as w_sft,
        r.w_grpo * greatest(1 - t.hard - t.easy, 0) as w_grpo,
        r.w_gal * greatest(1 - t.hard - t.easy, 0) as w_gal
    )
from routed as r
inner join tails as t on t.prompt_id = r.prompt_id
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
