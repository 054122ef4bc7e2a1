-- audit/compared.sql
-- grain: one row per response token of a rollout in the shards that has log-probs of role old, under the policy that sampled it.
-- reads: shards, logprobs.
-- parameters: none; the other queries of this folder read it as the view `compared`.
select
    s.round,
    s.policy,
    s.item_id,
    s.prompt_id,
    unnest(range(len(s.tokens))) as position,
    unnest(s.tokens) as token,
    cast(unnest(s.old_logprobs) as double) as sampler,
    cast(unnest(l.logprobs) as double) as trainer
from shards as s
inner join logprobs as l on l.round = s.round and l.role = 'old' and l.item_id = s.item_id and l.model = s.policy
where s.route = 'rl'
