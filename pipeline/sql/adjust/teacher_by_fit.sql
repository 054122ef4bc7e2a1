-- adjust/teacher_by_fit.sql
-- grain: one row per row of `routed` but all traces of a prompt except one: the one that the round's policy finds most likely by
-- the mean log-prob of its tokens, of equals the first by id.
-- reads: routed, fits (trace_id, logp: the mean log-prob of a token; stored as logprobs of roles fit-TEACHER). parameters: none.
with chosen as (
    select r.prompt_id, arg_min(r.item_id, (coalesce(-f.logp, error('trace ' || r.item_id || ' has no stored fit')), r.item_id)) as item_id
    from routed as r
    left join fits as f on f.trace_id = r.item_id
    where r.route = 'sft'
    group by r.prompt_id
)
select r.*
from routed as r
left join chosen as c on c.prompt_id = r.prompt_id
where r.route <> 'sft' or r.item_id = c.item_id
order by r.route, r.prompt_id, r.source_round, r.sample, r.item_id
