-- audit/tokens.sql
-- grain: one row per token, the ten of each policy where sampler and trainer differ most.
-- reads: compared (audit/compared.sql).
-- parameters: $round.
select policy, item_id, prompt_id, position, token, sampler, trainer
from compared
where round = $round
qualify row_number() over (partition by policy order by abs(trainer - sampler) desc, item_id, position) <= 10
order by policy, abs(trainer - sampler) desc, item_id, position
