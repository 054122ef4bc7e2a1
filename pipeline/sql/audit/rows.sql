-- audit/rows.sql
-- grain: one row per rollout, the ten of each policy where sampler and trainer differ most on average.
-- reads: compared (audit/compared.sql).
-- parameters: $round.
select policy, item_id, prompt_id, count(*) as tokens, avg(abs(trainer - sampler)) as mean_difference
from compared
where round = $round
group by policy, item_id, prompt_id
qualify row_number() over (partition by policy order by avg(abs(trainer - sampler)) desc, item_id) <= 10
order by policy, mean_difference desc, item_id
