-- sequences.sql
-- grain: one row per row of `routed` (what a routing query returned) whose route is $route: it, with its token lists.
-- reads: routed, rollouts, fitting_traces. parameters: $route.
-- The only query of grading that reads token lists; it runs once a route, its result is never held whole.
select k.*, r.prompt_tokens, r.tokens, r.logprobs as old_logprobs
from routed as k
inner join rollouts as r on r.round = k.source_round and r.rollout_id = k.item_id
where k.route = 'rl' and $route = 'rl'
union all
select k.*, t.prompt_tokens, t.tokens, null as old_logprobs
from routed as k
inner join fitting_traces as t on t.trace_id = k.item_id
where k.route = 'sft' and $route = 'sft'
order by prompt_id, sample, item_id
