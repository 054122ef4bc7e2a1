-- report/tokens.sql
-- grain: one row per (round, route, teacher): what the optimizer was fed. reads: draws, shards.
select
    draws.round,
    draws.route,
    draws.teacher,
    count(*) as sequences,
    count(distinct draws.prompt_id) as prompts,
    cast(sum(len(shards.tokens)) as bigint) as tokens
from draws
inner join shards using (round, route, item_id)
group by all
order by round, route, teacher nulls first
