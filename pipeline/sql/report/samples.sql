-- report/samples.sql
-- grain: one row per rollout shown. reads: grades, rollouts, scores, prompts. $prompts: how many of each grade.
-- Of the last round whose rollouts were graded: the first prompts of each grade by id (an id is a hash, so this is as
-- good as a draw and is the same in every report), and of each the first right and the first wrong rollout.
with chosen as (
    select prompt_id, round, grade, successes, k, reason
    from grades
    where source_round = round and round = (select max(round) from grades where source_round = round)
    qualify row_number() over (partition by grade order by prompt_id) <= $prompts
)

select
    chosen.grade,
    chosen.prompt_id,
    chosen.round,
    chosen.successes,
    chosen.k,
    chosen.reason,
    prompts.messages,
    prompts.answer,
    rollouts.rollout_id,
    rollouts.sample,
    rollouts.text,
    rollouts.finish_reason,
    len(rollouts.tokens) as tokens,
    scores.status,
    scores.extracted,
    coalesce(scores.correct, false) as correct
from chosen
inner join prompts using (prompt_id)
inner join rollouts using (prompt_id, round)
left join scores on scores.kind = 'rollout' and scores.id = rollouts.rollout_id
qualify row_number() over (
    partition by chosen.prompt_id, coalesce(scores.correct, false) order by rollouts.sample
) = 1
order by grade, prompt_id, sample
