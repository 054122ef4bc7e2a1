-- report/grade_mix.sql
-- grain: one row per (round, grade), grades without a prompt included. reads: grades.
select
    rounds.round,
    kinds.grade,
    count(grades.prompt_id) as prompts
from (select distinct round from grades) as rounds
cross join (values ('easy'), ('mid'), ('hard')) as kinds (grade)
left join grades on grades.round = rounds.round and grades.grade = kinds.grade
group by all
order by round, grade
