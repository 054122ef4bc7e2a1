-- reuse.sql
-- grain: one row per prompt of the round whose rollouts are not drawn anew: which round's stored ones stand for them, and why.
-- reads: grades, rollouts, skips, round_prompts. parameters: $round, $k, $policy (that the round samples),
-- $max_age, $token_budget (null: none).
-- Drawn anew: prompts never graded, those whose newest own grade is mid, that moved between their last two, that were not judged, or
-- whose rollouts are older than $max_age rounds. Under a budget in that order (never graded first), as far as k of the lengths
-- that the prompt's rollouts had go (never graded ones are drawn whatever it says); what it cannot pay for is reused whatever its grade, or is stale if it is too old.
with history as (
    select
        prompt_id,
        round,
        grade,
        reason,
        row_number() over newest as back,
        lead(grade) over newest as grade_before
    from grades
    where round < $round and source_round = round and prompt_id in (select prompt_id from round_prompts)
    window newest as (partition by prompt_id order by round desc)
),
lengths as (
    select prompt_id, round, avg(length) as tokens
    from rollouts
    where round < $round and prompt_id in (select prompt_id from round_prompts)
    group by all
),
standing as (
    select
        p.prompt_id,
        h.round as source_round,
        h.grade,
        case
            when h.prompt_id is null then 0
            when h.grade = 'mid' then 1
            when h.grade_before <> h.grade then 2
            when h.reason in ('unjudged', 'incomplete_group', 'stale') then 3
            when $round - h.round > $max_age then 4
        end as need,
        coalesce(l.tokens, avg(l.tokens) over (), 0) * $k as tokens
    from round_prompts as p
    left join history as h on h.prompt_id = p.prompt_id and h.back = 1
    left join lengths as l on l.prompt_id = h.prompt_id and l.round = h.round
),
paid as (
    select *, sum(tokens) over (order by need, md5(prompt_id), prompt_id rows unbounded preceding) as spent
    from standing
    where need is not null
)
select
    s.prompt_id,
    cast($round as integer) as round,
    cast(s.source_round as integer) as source_round,
    cast(0 as integer) as draws,
    cast($k as integer) as skipped,
    s.grade,
    old.chance as chance,
    case when s.need is null then 'unmoved' when $round - s.source_round > $max_age then 'stale' else 'budget' end as why
from standing as s
left join paid as p on p.prompt_id = s.prompt_id
left join skips as old on old.prompt_id = s.prompt_id and old.round = s.source_round
where
    s.source_round is not null
    and (s.need is null or p.spent > $token_budget)
    and s.prompt_id not in (select prompt_id from rollouts where round = $round and policy = $policy)
order by s.prompt_id
