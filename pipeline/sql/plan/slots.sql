-- plan/slots.sql
-- grain: one row per route: what its shards are as token slots of packed rows (trainer/batch.py). reads: shards.
-- parameters: $round, $visits (prompts that a step draws).
-- A response's last token has no slot. A Mid prompt is visited as its whole group, a Hard one as one trace of one teacher, each
-- teacher alike. `largest`: the route's share of the step that would draw the $visits largest prompts.
with sequences as (
    select route, prompt_id, teacher, len(prompt_tokens) as prompt, len(tokens) - 1 as response
    from shards
    where round = $round
),
by_teacher as (
    select
        prompt_id, max(prompt) as prompt, avg(response) as response, avg(prompt + response) as slots,
        max(prompt + response) as most
    from sequences
    where route = 'sft'
    group by prompt_id, teacher
),
visits as (
    select
        'rl' as route, prompt_id, max(prompt) as prompt, avg(response) as response, max(prompt) + sum(response) as slots,
        max(prompt) + sum(response) as most, max(prompt + response) as sequence
    from sequences
    where route = 'rl'
    group by prompt_id
    union all
    select 'sft' as route, prompt_id, max(prompt), avg(response), avg(slots), max(most), max(most)
    from by_teacher
    group by prompt_id
),
-- a prompt with a group and a trace is visited as both
ranked as (
    select v.*, p.of_the_largest, p.prompts
    from visits as v
    inner join (
        select prompt_id, row_number() over (order by sum(most) desc, prompt_id) <= $visits as of_the_largest, count(*) over () as prompts
        from visits
        group by prompt_id
    ) as p on p.prompt_id = v.prompt_id
)
select
    route,
    count(*) as visits,
    any_value(prompts) as prompts,
    avg(prompt) as prompt,
    avg(response) as response,
    avg(slots) as slots,
    cast(max(most) as bigint) as most,
    cast(max(sequence) as bigint) as sequence,
    cast(coalesce(sum(most) filter (of_the_largest), 0) as bigint) as largest
from ranked
group by route
order by route
