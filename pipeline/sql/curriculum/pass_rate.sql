-- curriculum/pass_rate.sql
-- grain: one row per prompt graded in $round: the weight that its gate is multiplied by.
-- reads: grades. parameters: $round.
-- Mid prompts by 4 p (1 - p), p the share that is right: 1 at one half, where a group says most, and less towards either end.
-- Hard prompts have no p to go by and keep 1.
select
    prompt_id,
    case when grade = 'mid' then 4e0 * successes * (k - successes) / (k * k) else 1e0 end as weight
from grades
where round = $round
order by prompt_id
