-- sampled_prompts.sql
-- grain: one row per prompt among (the first $rows) rollouts of $round: its messages, and the tokens that it was sampled as.
-- reads: rollouts, prompts. parameters: $round, $rows (null: all of them).
with seen as (
    select prompt_id, prompt_tokens
    from rollouts
    where round = $round
    limit $rows
)
select s.prompt_id, p.messages, min(s.prompt_tokens) as tokens
from seen as s
inner join prompts as p on p.prompt_id = s.prompt_id
group by all
order by s.prompt_id
