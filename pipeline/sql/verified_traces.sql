-- verified_traces.sql
-- grain: one row per teacher trace of a prompt of the round whose verdict is ok.
-- prompt_tokens: as its rollouts have them; null for a prompt without any (a method may need none).
-- reads: rollouts, traces, scores, prompts, round_prompts. parameters: none.
-- Python renders and tokenises these with the policy's tokenizer and offers the result to the other queries as fitting_traces.
with verified as (
    select t.trace_id, t.prompt_id, t.teacher, t.sample, t.text, t.finish_reason, s.reward
    from traces as t
    inner join scores as s on s.kind = 'trace' and s.id = t.trace_id and s.correct
    where t.prompt_id in (select prompt_id from round_prompts)
),
first as (  -- every rollout of a prompt has the same prompt tokens
    select r.prompt_id, r.round, min(r.sample) as sample
    from rollouts as r
    inner join round_prompts as p on p.prompt_id = r.prompt_id and p.source_round = r.round
    where r.prompt_id in (select prompt_id from verified)
    group by r.prompt_id, r.round
)
select v.*, p.messages, r.prompt_tokens
from verified as v
left join first as f on f.prompt_id = v.prompt_id
left join rollouts as r on r.round = f.round and r.prompt_id = f.prompt_id and r.sample = f.sample
inner join prompts as p on p.prompt_id = v.prompt_id
order by v.trace_id
