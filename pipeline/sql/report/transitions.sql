-- report/transitions.sql
-- grain: one row per (from_round, from_grade, to_grade). reads: grades.
-- A prompt moves from one round in which it was graded to the next one in which it was, so a round that drew other
-- prompts in between does not hide the move; from_round and to_round are of each prompt's own consecutive grades.
-- Grades carried over from an older round (source_round < round) are no news and are left out.
with moves as (
    select
        round as from_round,
        grade as from_grade,
        lead(round) over by_prompt as to_round,
        lead(grade) over by_prompt as to_grade
    from grades
    where source_round = round
    window by_prompt as (partition by prompt_id order by round)
)
select
    from_round,
    to_round,
    from_grade,
    to_grade,
    count(*) as prompts
from moves
where to_round is not null
group by all
order by from_round, to_round, from_grade, to_grade
