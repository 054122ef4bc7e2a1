-- verified_traces.sql
-- grain: one row per teacher trace of a prompt rolled out in $round whose verdict is ok.
-- reads: rollouts, traces, scores, prompts, round_prompts. parameters: $round.
-- Python renders and tokenises these with the policy's tokenizer and offers the result to the other queries as fitting_traces.
with verified as (
    select t.trace_id, t.prompt_id, t.teacher, t.sample, t.text, t.finish_reason, s.reward
    from traces as t
    inner join scores as s on s.kind = 'trace' and s.id = t.trace_id and s.correct
    where t.prompt_id in (select prompt_id from round_prompts)
),
first as (  -- every rollout of a prompt has the same prompt tokens
    select prompt_id, min(sample) as sample
    from rollouts
    where round = $round and prompt_id in (select prompt_id from verified)
    group by prompt_id
)
select v.*, p.messages, r.prompt_tokens
from verified as v
inner join first as f on f.prompt_id = v.prompt_id
inner join rollouts as r on r.round = $round and r.prompt_id = f.prompt_id and r.sample = f.sample
inner join prompts as p on p.prompt_id = v.prompt_id
order by v.trace_id
