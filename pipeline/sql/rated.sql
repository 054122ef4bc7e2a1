-- rated.sql
-- grain: one row per sequence that a discriminator reads: each rollout and each fitting trace of a rated prompt.
-- reads: rated_prompts (rated_prompts.sql), verdicts (verdicts.sql), rollouts, fitting_traces, learned (prompt_id).
-- parameters: $max_tokens, $all (false: of the prompts in `learned` only).
with asked as (
    select * from rated_prompts
    where $all or prompt_id in (select prompt_id from learned)
)
select v.prompt_id, 'rollout' as kind, r.rollout_id as item_id, r.tokens
from verdicts as v
inner join asked as a on a.prompt_id = v.prompt_id
inner join rollouts as r on r.round = a.source_round and r.rollout_id = v.rollout_id
union all
select t.prompt_id, 'trace' as kind, t.trace_id as item_id, t.tokens
from fitting_traces as t
inner join asked as a on a.prompt_id = t.prompt_id
where t.n_tokens <= $max_tokens
order by prompt_id, kind, item_id
