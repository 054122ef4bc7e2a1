-- verdicts.sql
-- grain: one row per rollout of a train prompt of $round, with its verdict; keys and lengths, no token lists.
-- reads: rollouts, scores, round_prompts (the round's train prompts). parameters: $round, $k.
-- The one join of ids that grading and routing both stand on: made once, sorted, and offered to their queries as `verdicts`.
select
    r.prompt_id,
    r.sample,
    r.rollout_id,
    r.policy,
    r.temperature,
    r.finish_reason,
    r.prompt_length + r.length as n_tokens,
    s.status,
    s.reward,
    s.correct
from rollouts as r
inner join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
where r.round = $round and r.sample < $k and r.prompt_id in (select prompt_id from round_prompts)
order by r.prompt_id, r.sample, r.rollout_id
