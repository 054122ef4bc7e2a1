-- sequences.sql
-- grain: one row per row of `routed` (what a routing query returned) whose route is $route: its place there and its token lists.
-- reads: routed (with file_row_number), rollouts, fitting_traces. parameters: $route.
-- The only query of grading that reads token lists. They are sorted by a number, not by the keys, which stand in `routed` in
-- their order already; the result is never held whole.
select k.file_row_number as place, r.prompt_tokens, r.tokens, r.logprobs as old_logprobs
from routed as k
inner join rollouts as r on r.round = k.source_round and r.rollout_id = k.item_id
where k.route = 'rl' and $route = 'rl'
union all
select k.file_row_number as place, t.prompt_tokens, t.tokens, null as old_logprobs
from routed as k
inner join fitting_traces as t on t.trace_id = k.item_id
where k.route = 'sft' and $route = 'sft'
order by place
