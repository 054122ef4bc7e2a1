-- verdicts.sql
-- grain: one row per rollout that stands for a train prompt of the round, with its verdict; keys and lengths, no token lists.
-- reads: rollouts, scores, round_prompts (round_prompts.sql). parameters: $k.
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
inner join round_prompts as p on p.prompt_id = r.prompt_id and p.source_round = r.round
where r.sample < $k
order by r.prompt_id, r.sample, r.rollout_id
