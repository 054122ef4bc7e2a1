-- verified_traces.sql
-- grain: one row per teacher trace of a prompt rolled out in $round whose verdict is ok.
-- reads: rollouts, traces, scores, prompts. parameters: $round.
-- Python renders and tokenises these with the policy's tokenizer and offers the result to grade.sql as fitting_traces.
with asked as (
    select prompt_id, min(prompt_tokens) as prompt_tokens
    from rollouts
    where round = $round
    group by prompt_id
)
select t.trace_id, t.prompt_id, t.teacher, t.sample, t.text, t.finish_reason, s.reward, p.messages, a.prompt_tokens
from traces as t
inner join scores as s on s.kind = 'trace' and s.id = t.trace_id and s.correct
inner join asked as a on a.prompt_id = t.prompt_id
inner join prompts as p on p.prompt_id = t.prompt_id
where p.split = 'train'
order by t.trace_id
