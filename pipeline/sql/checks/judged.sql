-- checks/judged.sql
-- grain: one row: rollouts that are to be graded in $round, and verdicts made of them. Equal numbers = pass.
-- reads: rollouts, round_prompts, verdicts. parameters: $round, $k.
select
    (
        select count(*)
        from rollouts
        where round = $round and sample < $k and prompt_id in (select prompt_id from round_prompts)
    ) as rollouts,
    (select count(*) from verdicts) as verdicts
