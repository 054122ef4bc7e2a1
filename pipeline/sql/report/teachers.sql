-- report/teachers.sql
-- grain: one row per teacher. reads: traces, scores (kind = trace), grades.
-- Hard prompts: graded hard in any round. alone: Hard prompts that no other teacher has a verified trace of, which is
-- what would be lost without this teacher.
with judged as (
    select
        traces.teacher,
        traces.prompt_id,
        len(traces.text) as characters,
        coalesce(scores.correct, false) as verified
    from traces
    left join scores on scores.kind = 'trace' and scores.id = traces.trace_id
),

hard as (select distinct prompt_id from grades where grade = 'hard'),

covers as (
    select prompt_id, teacher, count(*) over (partition by prompt_id) as teachers
    from (select distinct prompt_id, teacher from judged where verified)
    inner join hard using (prompt_id)
),

coverage as (
    select
        teacher,
        count(*) as hard_covered,
        count(*) filter (teachers = 1) as hard_alone
    from covers
    group by teacher
)

select
    judged.teacher,
    count(*) as traces,
    count(distinct judged.prompt_id) as prompts,
    count(*) filter (judged.verified) as verified,
    avg(judged.characters) filter (judged.verified) as verified_characters,
    (select count(*) from hard) as hard_prompts,
    any_value(coalesce(coverage.hard_covered, 0)) as hard_covered,
    any_value(coalesce(coverage.hard_alone, 0)) as hard_alone
from judged
left join coverage using (teacher)
group by judged.teacher
order by teacher
