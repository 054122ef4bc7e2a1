-- rated_prompts.sql
-- grain: one row per prompt of $round that is rated: it has rollouts and a trace that fits, whatever its grade; what is compared is text.
-- reads: grades. parameters: $round.
select prompt_id, source_round
from grades
where round = $round and traces > 0 and reason not in ('unjudged', 'incomplete_group', 'stale', 'too_long')
order by prompt_id
