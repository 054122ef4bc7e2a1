-- fitting.sql
-- grain: one row per verified trace of a prompt of the round that is short enough to be trained on, as a row of shards.
-- reads: fitting_traces. parameters: $max_tokens.
select trace_id, prompt_id, teacher, sample, prompt_tokens, tokens, finish_reason, reward
from fitting_traces
where n_tokens <= $max_tokens
order by prompt_id, trace_id
