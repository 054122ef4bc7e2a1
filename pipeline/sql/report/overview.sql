-- report/overview.sql
-- grain: one row for the whole run. reads: prompts, rollouts, traces, grades, draws, shards, metrics.
-- Tokens are the response's: prompts are computed once for their group and are not what a run pays for.
select
    (select count(*) from prompts where split = 'train') as train_prompts,
    (select count(*) from prompts where split = 'eval') as eval_prompts,
    (select count(*) from rollouts) as rollouts,
    (select coalesce(sum(len(tokens)), 0) from rollouts) as rollout_tokens,
    (select count(*) from traces) as traces,
    (select count(distinct round) from grades) as rounds,
    (select count(*) from (select distinct round, step from metrics)) as steps,
    (select count(*) from draws) as trained_sequences,
    (
        select coalesce(sum(len(shards.tokens)), 0)
        from draws
        inner join shards using (round, route, item_id)
    ) as trained_tokens
