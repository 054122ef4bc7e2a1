-- sequential.sql
-- grain: one row per prompt of the round that has a judged rollout in it: its draws and successes, and what earlier rounds saw of it.
-- reads: rollouts, scores, asked (the prompts to draw for). parameters: $round, $k, $block, $memory.
-- An earlier round counts for $memory ** (how many rounds ago); a verdict that could not be had counts as not correct, as in grade.sql.
with judged as (
    select r.prompt_id, r.round, r.sample, s.correct
    from rollouts as r
    inner join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
    where r.round <= $round and r.sample < $k and r.prompt_id in (select prompt_id from asked)
),
rounds as (
    select
        prompt_id,
        round,
        count(*) as draws,
        count(*) filter (where correct) as successes,
        count(*) filter (where sample < $block) as first_draws,
        count(*) filter (where sample < $block and correct) as first_successes
    from judged
    group by all
)
select
    prompt_id,
    cast(sum(draws) filter (where round = $round) as integer) as draws,
    cast(sum(successes) filter (where round = $round) as integer) as successes,
    cast(sum(first_draws) filter (where round = $round) as integer) as first_draws,
    cast(sum(first_successes) filter (where round = $round) as integer) as first_successes,
    coalesce(sum(successes * power($memory, $round - round) order by round) filter (where round < $round), 0) as past_successes,
    coalesce(sum((draws - successes) * power($memory, $round - round) order by round) filter (where round < $round), 0) as past_failures
from rounds
group by prompt_id
having draws is not null
order by prompt_id
