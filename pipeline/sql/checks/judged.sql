-- checks/judged.sql
-- grain: one row: rollouts that are to be graded, and verdicts made of them. Equal numbers = pass.
-- reads: rollouts, round_prompts, verdicts. parameters: $k.
select
    (
        select count(*)
        from rollouts as r
        inner join round_prompts as p on p.prompt_id = r.prompt_id and p.source_round = r.round
        where r.sample < $k
    ) as rollouts,
    (select count(*) from verdicts) as verdicts
