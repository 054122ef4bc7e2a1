-- round_prompts.sql
-- grain: one row per train prompt of $round: the round whose rollouts are counted, and what is known of a group that was not drawn whole.
-- decided: the grade of a group that was stopped, here or in its own round.
-- reads: drawn (the round's prompts), skipped (its rows of skips). parameters: $round.
select
    d.prompt_id,
    cast(coalesce(s.source_round, $round) as integer) as source_round,
    case when s.chance is not null then s.grade end as decided,
    coalesce(s.why = 'stale', false) as stale
from drawn as d
left join skipped as s on s.prompt_id = d.prompt_id
order by d.prompt_id
