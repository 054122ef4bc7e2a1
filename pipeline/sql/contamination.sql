-- contamination.sql
-- grain: one row per train prompt and eval prompt that share text.
-- reads: problems (prompt_id, source, split, words: the problem's normalised words, apart by one space).
-- parameters: $ngram: words in a row that must be the same; $shortest: of a problem with fewer words than that, only the whole
-- problem counts; $common: a run of words that stands in more train, or more eval, prompts than this is a set phrase.
-- A problem of less than $ngram words is looked for whole in the other one, so the run of a pair is min($ngram, both lengths) long.
-- Set phrases are left out before pairs are made: an instruction in every prompt would pair everything with everything.
-- Runs are compared by hash, which is what keeps memory small, and pairs then by their words.
with texts as (
    select prompt_id, source, split, words, string_split(words, ' ') as w from problems where words <> ''
),
lengths as (
    select distinct least(len(w), $ngram) as n from texts where len(w) >= $shortest
),
eval_runs as (
    select distinct t.prompt_id, l.n, unnest([hash(t.w[i : i + l.n - 1]) for i in range(1, len(t.w) - l.n + 2)]) as run
    from texts as t
    inner join lengths as l on l.n <= len(t.w)
    where t.split = 'eval'
),
looked_for as (
    select run from eval_runs group by run having count(*) <= $common
),
openings as (
    select distinct unnest([hash(w[i : i + $shortest - 1]) for i in range(1, len(w) - $shortest + 2)]) as opening
    from texts
    where split = 'eval'
),
train_places as (  -- where a run that is looked for may begin: cheap, and few are left
    select prompt_id, pos
    from (
        select prompt_id, unnest(range(1, len(w) - $shortest + 2)) as pos,
            unnest([hash(w[i : i + $shortest - 1]) for i in range(1, len(w) - $shortest + 2)]) as opening
        from texts
        where split = 'train'
    )
    semi join openings using (opening)
),
train_runs as (
    select prompt_id, n, run, any_value(words) as words
    from (
        select t.prompt_id, l.n, hash(t.w[p.pos : p.pos + l.n - 1]) as run, array_to_string(t.w[p.pos : p.pos + l.n - 1], ' ') as words
        from train_places as p
        inner join texts as t on t.prompt_id = p.prompt_id
        inner join lengths as l on p.pos + l.n - 1 <= len(t.w)
    )
    semi join looked_for using (run)
    group by prompt_id, n, run
),
found as (
    select run from train_runs group by run having count(*) <= $common
),
shared as (
    select t.prompt_id, e.prompt_id as eval_prompt_id, t.n, t.words as run
    from train_runs as t
    semi join found as f on f.run = t.run
    inner join eval_runs as e on e.run = t.run
    inner join texts as tt on tt.prompt_id = t.prompt_id
    inner join texts as et on et.prompt_id = e.prompt_id
    where t.n = least(len(tt.w), len(et.w), $ngram) and contains(' ' || et.words || ' ', ' ' || t.words || ' ')
),
totals as (
    select prompt_id as eval_prompt_id, n, count(*) as runs from eval_runs group by all
),
pairs as (
    select s.prompt_id, s.eval_prompt_id, s.n as words, min(s.run) as run, count(*) / any_value(t.runs) as overlap
    from shared as s
    inner join totals as t using (eval_prompt_id, n)
    group by all
    union by name
    select t.prompt_id, e.prompt_id as eval_prompt_id, len(t.w) as words, t.words as run, 1.0 as overlap
    from texts as t
    inner join texts as e on e.words = t.words
    where t.split = 'train' and e.split = 'eval'
)
select
    p.prompt_id,
    p.eval_prompt_id,
    t.source,
    e.source as eval_source,
    cast(max(p.words) as integer) as words,
    arg_max(p.run, p.words) as run,
    max(p.overlap) as overlap
from pairs as p
inner join texts as t on t.prompt_id = p.prompt_id
inner join texts as e on e.prompt_id = p.eval_prompt_id
group by all
order by p.prompt_id, p.eval_prompt_id
