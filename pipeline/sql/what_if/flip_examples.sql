-- what_if/flip_examples.sql
-- grain: one row per verdict that flipped, the first $examples of each (kind, status before, status after).
-- reads: scores_was, scores_now (verdicts of two verifiers on the same rows), prompts, rollouts, traces. parameters: $examples.
with flipped as (
    select n.kind, w.status as was, n.status as became, n.id, n.prompt_id, w.extracted as extracted_was, n.extracted as extracted_now
    from scores_now as n
    inner join scores_was as w on w.kind = n.kind and w.id = n.id and w.text_sha = n.text_sha
    where w.status <> n.status
    qualify row_number() over (partition by n.kind, w.status, n.status order by n.id) <= $examples
)
select
    f.kind,
    f.was,
    f.became,
    f.id,
    f.prompt_id,
    p.answer,
    f.extracted_was,
    f.extracted_now,
    right(coalesce(r.text, t.text), 200) as text_end
from flipped as f
inner join prompts as p on p.prompt_id = f.prompt_id
left join rollouts as r on f.kind = 'rollout' and r.rollout_id = f.id
left join traces as t on f.kind = 'trace' and t.trace_id = f.id
order by all
