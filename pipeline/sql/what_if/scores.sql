-- what_if/scores.sql
-- grain: one row per verdict: the one of other_scores where there is one on that row, else the stored one.
-- reads: stored_scores, other_scores. parameters: none.
select * from stored_scores anti join other_scores using (kind, id)
union all by name
select * from other_scores
order by kind, id
