-- adjust/posterior.sql
-- grain: one row per row of `routed`: the same, its gates multiplied by how sure the grade is.
-- reads: routed, grades, earlier_grades. parameters: $round, $k, $hard_max_successes, $easy_max_failures.
-- Of a prompt's pass rate p, from a uniform prior and its judged rollouts of this round and the rounds before: n of them, s right.
-- A trace is weighed by P(p < hard), a group by what is left of both ends, where hard is (hard_max_successes + 1) / (k + 1) and easy likewise
-- from above. P(p < t) is P(X > s) of X ~ Binomial(n + 1, t). A prompt without a grade (a round without rollouts) keeps its gates.
-- So that a prompt on the border is supervised in part, name its grade in train.method.supervise too.
with now as (
    select * from grades where round = $round
),
seen as (
    select prompt_id, k - unjudged as n, successes as s from now
    union all
    select e.prompt_id, e.k - e.unjudged as n, e.successes as s
    from earlier_grades as e
    inner join now on now.prompt_id = e.prompt_id
    where e.round < $round and e.source_round = e.round and e.round <> now.source_round  -- each rollout counts once
),
counts as (
    select
        prompt_id, cast(sum(n) as integer) as n, cast(sum(s) as integer) as s,
        ($hard_max_successes + 1e0) / ($k + 1) as hard_below, ($easy_max_failures + 1e0) / ($k + 1) as easy_below
    from seen
    group by prompt_id
),
tails as (
    select
        prompt_id,
        greatest(1 - list_sum(list_transform(range(0, s + 1), lambda i: exp(
            lgamma(n + 2) - lgamma(i + 1) - lgamma(n + 2 - i) + i * ln(hard_below) + (n + 1 - i) * ln(1 - hard_below)
        ))), 0) as hard,
        greatest(1 - list_sum(list_transform(range(0, n - s + 1), lambda i: exp(
            lgamma(n + 2) - lgamma(i + 1) - lgamma(n + 2 - i) + i * ln(easy_below) + (n + 1 - i) * ln(1 - easy_below)
        ))), 0) as easy
    from counts
)
select
    r.* replace (
        r.w_sft * coalesce(t.hard, 1) as w_sft,
        r.w_grpo * coalesce(greatest(1 - t.hard - t.easy, 0), 1) as w_grpo,
        r.w_gal * coalesce(greatest(1 - t.hard - t.easy, 0), 1) as w_gal
    )
from routed as r
left join tails as t on t.prompt_id = r.prompt_id
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
