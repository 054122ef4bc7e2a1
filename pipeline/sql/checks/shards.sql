-- checks/shards.sql
-- grain: one row per offending sequence in `new_shards` (what a routing query returned). Zero rows = pass.
-- reads: new_shards (no token lists), round_prompts. parameters: none.
with doubled as (
    select route, item_id from new_shards group by route, item_id having count(*) > 1
),
-- traces that are members of their prompt's group
members as (
    select distinct prompt_id from new_shards where route = 'sft' and group_size > 1
),
broken as (
    select prompt_id
    from new_shards
    where route = 'rl'
    group by prompt_id
    having min(group_size) <> max(group_size)
        or max(group_size) <> count(*) + (prompt_id in (select prompt_id from members))::integer
),
judged as (
    select route, prompt_id, item_id,
        case
            when prompt_id not in (select prompt_id from round_prompts) then 'not a train prompt of this round'
            when (route, item_id) in (select (route, item_id) from doubled) then 'the sequence stands twice'
            when route not in ('rl', 'sft') then 'route is neither rl nor sft'
            when route = 'rl' and prompt_id in (select prompt_id from broken) then 'the group is not whole'
            when route = 'rl' and temperature <= 0 then 'an rl row sampled at temperature 0'
            when not (isfinite(w_sft) and isfinite(w_grpo) and isfinite(w_gal) and isfinite(advantage)) then 'a weight is not finite'
            when least(w_sft, w_grpo, w_gal) < 0 then 'a weight is negative'
            when route = 'rl' and w_sft <> 0 then 'w_sft on an rl row: only sft rows have that term'
            when route = 'sft' and w_gal <> 0 then 'w_gal on an sft row: only groups of rollouts have that term'
            when route = 'sft' and w_grpo <> 0 and group_size = 1 then 'w_grpo on an sft row that is in no group (group_size 1)'
            when route = 'sft' and teacher is null then 'an sft row without a teacher'
        end as why
    from new_shards
)
select * from judged
where why is not null
order by all
