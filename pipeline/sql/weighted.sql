-- weighted.sql
-- grain: one row per row of `routed`: the same, its gates multiplied by the curriculum's weight for the prompt.
-- reads: routed (with file_row_number), curriculum (one of curriculum/, or the recipe's own: prompt_id, weight). parameters: none.
-- A prompt without a weight gets NaN, which checks/shards.sql refuses.
with known as (
    select r.*, coalesce(c.weight, 'nan') as weight
    from routed as r
    left join curriculum as c on c.prompt_id = r.prompt_id
)
select * exclude (weight) replace (w_sft * weight as w_sft, w_grpo * weight as w_grpo, w_gal * weight as w_gal)
from known
order by file_row_number
