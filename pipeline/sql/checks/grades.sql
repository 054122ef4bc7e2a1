-- checks/grades.sql
-- grain: one row per offending row of `new_grades` (what a grading query returned). Zero rows = pass.
-- reads: new_grades, round_prompts. parameters: $round.
select g.prompt_id, g.grade, g.reason,
    case
        when p.prompt_id is null then 'not a train prompt of this round'
        when count(*) over (partition by g.prompt_id) > 1 then 'the prompt stands twice'
        when g.round <> $round then 'another round'
        when g.source_round <> p.source_round then 'source_round is not the round whose rollouts stand for the prompt'
        when g.grade not in ('easy', 'mid', 'hard') then 'grade is not easy, mid or hard'
        when g.reason not in ('sft', 'rl', 'easy', 'no_verified_trace', 'too_long', 'unjudged', 'incomplete_group', 'stale')
            then 'reason is not one of those in docs/data.md'
    end as why
from new_grades as g
left join round_prompts as p on p.prompt_id = g.prompt_id
qualify why is not null
order by all
