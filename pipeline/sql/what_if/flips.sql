-- what_if/flips.sql
-- grain: one row per (kind, verifier, its versions, status before, status after) that some verdict went through.
-- reads: scores_was, scores_now (verdicts of two verifiers on the same rows). parameters: none.
select
    n.kind,
    n.verifier,
    w.verifier_version as version_was,
    n.verifier_version as version_now,
    w.status as was,
    n.status as became,
    count(*) as rows,
    count(distinct n.prompt_id) as prompts
from scores_now as n
inner join scores_was as w on w.kind = n.kind and w.id = n.id and w.text_sha = n.text_sha
where w.status <> n.status
group by all
order by all
