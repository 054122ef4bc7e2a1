-- what_if/lengths.sql
-- grain: one row per row of `routed`, with the length of its response.
-- reads: routed, rollouts, fitting_traces. parameters: none.
select k.route, k.prompt_id, k.item_id, coalesce(r.length, t.n_tokens - len(t.prompt_tokens)) as length
from routed as k
left join rollouts as r on k.route = 'rl' and r.round = k.source_round and r.rollout_id = k.item_id
left join fitting_traces as t on k.route = 'sft' and t.trace_id = k.item_id
order by route, prompt_id, item_id
