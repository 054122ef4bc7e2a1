-- what_if/routes.sql
-- grain: one row per route that a grading fills: prompts, sequences and response tokens, now and then, and prompts in both.
-- reads: shards_now, shards_then. parameters: none.
with now as (
    select route, prompt_id, count(*) as sequences, sum(length) as tokens from shards_now group by route, prompt_id
),
then_ as (
    select route, prompt_id, count(*) as sequences, sum(length) as tokens from shards_then group by route, prompt_id
)
select
    coalesce(n.route, t.route) as route,
    count(n.prompt_id) as prompts_now,
    count(t.prompt_id) as prompts_then,
    count(*) filter (where n.prompt_id is not null and t.prompt_id is not null) as prompts_both,
    cast(coalesce(sum(n.sequences), 0) as bigint) as sequences_now,
    cast(coalesce(sum(t.sequences), 0) as bigint) as sequences_then,
    cast(coalesce(sum(n.tokens), 0) as bigint) as tokens_now,
    cast(coalesce(sum(t.tokens), 0) as bigint) as tokens_then
from now as n
full join then_ as t on t.route = n.route and t.prompt_id = n.prompt_id
group by all
order by all
