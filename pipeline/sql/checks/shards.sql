-- checks/shards.sql
-- grain: one row per offending sequence in `new_shards` (what a routing query returned). Zero rows = pass.
-- reads: new_shards (no token lists), round_prompts. parameters: none.
select r.route, r.prompt_id, r.item_id,
    case
        when p.prompt_id is null then 'not a train prompt of this round'
        when count(*) over (partition by r.route, r.item_id) > 1 then 'the sequence stands twice'
        when r.route not in ('rl', 'sft') then 'route is neither rl nor sft'
        when r.route = 'rl' and r.group_size <> count(*) over (partition by r.route, r.prompt_id) then 'the group is not whole'
        when r.route = 'rl' and r.temperature <= 0 then 'an rl row sampled at temperature 0'
        when r.route = 'rl' and r.w_sft <> 0 then 'w_sft on an rl row: only sft rows have that term'
        when r.route = 'sft' and (r.w_grpo <> 0 or r.w_gal <> 0) then 'w_grpo or w_gal on an sft row'
        when r.route = 'sft' and r.teacher is null then 'an sft row without a teacher'
        when not (isfinite(r.w_sft) and isfinite(r.w_grpo) and isfinite(r.w_gal) and isfinite(r.advantage)) then 'a weight is not finite'
        when least(r.w_sft, r.w_grpo, r.w_gal) < 0 then 'a weight is negative'
    end as why
from new_shards as r
left join round_prompts as p on p.prompt_id = r.prompt_id
qualify why is not null
order by all
