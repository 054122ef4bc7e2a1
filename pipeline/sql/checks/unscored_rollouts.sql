-- checks/unscored_rollouts.sql
-- grain: one row per rollout of $round without a verdict. Zero rows = pass.
select r.rollout_id, r.prompt_id
from rollouts as r
left join scores as s on s.kind = 'rollout' and s.id = r.rollout_id
where r.round = $round and s.id is null
order by r.rollout_id
