"""generate: teacher traces, and k rollouts of the current policy. One work list, one anti-join, any engine.

The engine gets the whole work list and the set of finished samples (engines/base.py); each list that it yields becomes
one part file. What it could not produce becomes a row of table `failures`, and is tried again by the next run.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.context import Context
from pipeline.engines.base import Ask, Engine, Failure, Sample, Sampling
from pipeline.failures import record, settle
from pipeline.progress import progress
from pipeline.rows_digest import sorted_rows
from pipeline.skips import wanted as not_skipped
from pipeline.stage import (
    Outcome,
    Spec,
    begin,
    current,
    finish,
    finished,
    found_fingerprint,
    need,
    nothing,
    parts_of,
    put_back,
    restore,
)
from pipeline.store import Partition, read_parts
from schemas.errors import DypoError, UserError, WorkError
from schemas.ids import row_id, seed_from
from schemas.recipe import Teacher
from schemas.tables import ARROW

if TYPE_CHECKING:
    from pipeline.policy import Renderer

Reference = Callable[[Path], Callable[[list[int], list[int], float], list[float]]]  # folder -> its log-probs
Messages = list[dict[str, str]]
RUNNING = ("concurrency", "timeout_s", "retries", "max_failed", "path", "api_key_env", "base_url", "budget", "verdict")
RECORDS = 2  # version of what a replayed row keeps; raised, recorded traces are imported anew


# ---------------------------------------------------------------- teachers
def teacher_spec(ctx: Context, teacher: Teacher) -> Spec:
    """Depends on the teacher's engine and sampling; samples and prompts are the work list."""
    from pipeline.engines.teachers import content_id

    engine = teacher.engine.model_dump(mode="json", exclude=set(RUNNING))
    parents = {}
    if teacher.engine.type == "program":  # it sees answers and metadata, and is cheap to run again
        engine["program"] = teacher.engine.program.rpartition(".py:")[2]
        prompts = ctx.part("prompts").manifest()
        if prompts is None:
            raise UserError(f"{ctx.part('prompts').folder}: not there or not finished. Run `dypo ingest {ctx.run}` first")
        parents["prompts"] = prompts.identity
    if teacher.engine.type == "replay":
        engine["records"] = RECORDS
    if (content := content_id(teacher)) is not None:
        engine |= {"content": content}
    part = ctx.part("traces", teacher=teacher.name)
    return Spec("teachers", part, {"engine": engine}, parents, ctx.recipe.seed, expensive=teacher.engine.type == "openai")


def prompt_rows(ctx: Context, split: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The prompts of one split, in the order of their ids."""
    need(ctx.run, "prompts", {}, command=f"dypo ingest {ctx.run}")
    names = ["prompt_id", "messages", "answer", "metadata", "split", "source", *columns]
    rows = read_parts(ctx.part("prompts").files(), "prompts", names).to_pylist()
    return sorted((r for r in rows if r["split"] == split), key=lambda r: r["prompt_id"])


def asks(rows: Iterable[dict[str, Any]], samples: int, seed_parts: tuple) -> list[Ask]:
    """One Ask for each prompt, its seed a function of (seed_parts, prompt_id)."""
    return [
        Ask(
            r["prompt_id"],
            r["messages"],
            tuple(range(samples)),
            seed_from(*seed_parts, r["prompt_id"]),
            r["answer"],
            json.loads(r["metadata"] or "{}"),
        )
        for r in rows
    ]


def teachers(ctx: Context, *, regenerate: bool = False) -> list[Outcome]:
    """Every teacher's traces for the train prompts."""
    if not ctx.recipe.teachers:
        return []
    rows = prompt_rows(ctx, "train")
    return [_teacher(ctx, teacher, rows, regenerate) for teacher in ctx.recipe.teachers]


def _teacher(ctx: Context, teacher: Teacher, rows: list[dict[str, Any]], regenerate: bool) -> Outcome:
    from pipeline.engines.teachers import teacher_engine

    it = teacher_spec(ctx, teacher)
    work = asks(rows, teacher.samples, (ctx.recipe.seed, "teacher", teacher.name))
    seeds = {a.prompt_id: a.seed for a in work}

    def row(s: Sample) -> dict[str, Any]:
        made_by = (s.prompt_id, teacher.name, s.sample, seeds[s.prompt_id], it.fingerprint)
        return {
            "trace_id": row_id(*made_by), "prompt_id": s.prompt_id, "teacher": teacher.name, "sample": s.sample,
            "text": s.text, "finish_reason": s.finish_reason, "model": s.model, "sampling": s.sampling,
        }  # fmt: skip

    allowed = 0.0 if teacher.engine.type == "replay" else teacher.engine.max_failed
    return _generate(it, work, lambda: teacher_engine(teacher, parts_of(it)), row, allowed, regenerate)


# ---------------------------------------------------------------- rollouts
def round_prompts(ctx: Context, round: int) -> list[dict[str, Any]]:
    """The round's prompts: all train prompts, or `prompts_per_round` of them drawn from (seed, round)."""
    rows = prompt_rows(ctx, "train")
    drawn = set(_drawn(ctx, round, [r["prompt_id"] for r in rows]))
    return [r for r in rows if r["prompt_id"] in drawn]


def round_prompt_ids(ctx: Context, round: int) -> Iterator[pa.Array]:
    """The ids of `round_prompts`, sorted, a batch at a time, without reading anything else."""
    need(ctx.run, "prompts", {}, command=f"dypo ingest {ctx.run}")
    train = sorted_rows(ctx.part("prompts").files(), ["prompt_id"], ["prompt_id"], "split = 'train'")
    ids = (batch.column("prompt_id") for batch in train)
    if ctx.recipe.rollouts.prompts_per_round is None:
        yield from ids
    else:
        yield pa.array(sorted(_drawn(ctx, round, [i for batch in ids for i in batch.to_pylist()])), pa.string())


def _drawn(ctx: Context, round: int, ids: list[str]) -> list[str]:
    n = ctx.recipe.rollouts.prompts_per_round
    if n is None or n >= len(ids):
        return ids
    return sorted(ids, key=lambda id_: seed_from(ctx.recipe.seed, "round", round, id_))[:n]


def sampling_config(ctx: Context, policy: str, sampling: Sampling) -> dict[str, Any]:
    """The part of a policy engine's settings that its rows depend on. Stored log-probs are named where they are not as sampled,
    the template where it is not the policy's own."""
    r, template = ctx.recipe.rollouts, ctx.recipe.policy.template
    config = {"policy": policy, "dtype": ctx.recipe.policy.dtype, "engine": r.engine.type, **vars(sampling)}
    config |= {} if r.engine.type == "hf" else {"seeded": r.engine.seeded}
    config |= {} if template == "chat" else {"template": template}
    return config | ({} if r.logprobs == "float32" else {"logprobs": r.logprobs})


def rollout_spec(ctx: Context, round: int) -> Spec:
    r = ctx.recipe.rollouts
    _, policy = ctx.policy_of(round)
    config = sampling_config(ctx, policy, Sampling(r.temperature, r.top_p, r.max_tokens))
    return Spec("rollouts", ctx.part("rollouts", round=round), config, {}, ctx.recipe.seed, expensive=True)


def rollouts(ctx: Context, round: int, *, regenerate: bool = False, reference: Reference | None = None) -> list[Outcome]:
    """k rollouts of the round's policy for each of the round's prompts, but for those that the recipe lets it skip (skips.py)."""
    r = ctx.recipe.rollouts
    rows = round_prompts(ctx, round)
    if rows and not ctx.recipe.train.method.routing(round).rl:  # nobody would read them
        from pipeline.policy import Renderer

        folder, _ = ctx.policy_of(round)
        renderer = Renderer(folder, ctx.recipe.policy.template)
        _, refused = _readable(folder, renderer, asks(rows, 1, (ctx.recipe.seed, round)), r.max_failed)
        return [_nothing_to_draw(rollout_spec(ctx, round), regenerate, refused)]
    samples, outcomes = not_skipped(ctx, round, [row["prompt_id"] for row in rows])
    drawn = [row for row in rows if row["prompt_id"] in samples]
    it = rollout_spec(ctx, round)
    if rows and not drawn:  # stored ones stand for every prompt
        return [*outcomes, _nothing_to_draw(it, regenerate)]
    work = [replace(ask, samples=tuple(range(samples[ask.prompt_id]))) for ask in asks(drawn, r.k, (ctx.recipe.seed, round))]
    sampling = Sampling(r.temperature, r.top_p, r.max_tokens)
    made = sample_policy(
        ctx, it, work, sampling, ctx.policy_of(round), {"round": round},
        regenerate=regenerate, reference=reference,
        max_failed=min(1.0, r.max_failed * len(rows) / max(1, len(drawn))),  # a share of the round's prompts, drawn anew or not
    )  # fmt: skip
    return [*outcomes, made]


def _nothing_to_draw(it: Spec, regenerate: bool, refused: Sequence[Failure] = ()) -> Outcome:
    """The partition of a round that draws nothing, since stored rollouts stand for its prompts or its method reads none."""
    if current(it):
        return nothing(it)
    begin(it, regenerate=regenerate)
    it.partition.folder.mkdir(parents=True, exist_ok=True)
    record(it, refused)
    return finish(it, failed=len(refused))


def sample_policy(
    ctx: Context,
    it: Spec,
    work: list[Ask],
    sampling: Sampling,
    policy: tuple[Any, str],
    keys: dict[str, Any],
    *,
    regenerate: bool = False,
    reference: Reference | None = None,
    max_failed: float = 0.0,
) -> Outcome:
    """Rollouts of one policy into one partition; training and evaluation both come through here."""
    from pipeline.policy import Renderer

    folder, policy_id = policy
    template = ctx.recipe.policy.template
    renderer = Renderer(folder, template)
    engine_config = ctx.recipe.rollouts.engine
    work, refused = _readable(folder, renderer, work, max_failed)
    by_id = {a.prompt_id: a for a in work}

    def engine() -> Engine:
        ctx.verify_policy(folder)
        if engine_config.type == "hf":
            from pipeline.engines.hf import HFSampler

            return HFSampler(folder, ctx.recipe.policy, engine_config, sampling, renderer)
        assert reference is not None, "the command passes the trainer's forward to a vllm engine"
        if engine_config.type == "vllm":
            from pipeline.engines.vllm import VLLMSampler

            return VLLMSampler(folder, ctx.recipe.policy, engine_config, sampling, renderer, reference(folder))
        from pipeline.engines.vllm_server import VLLMServerSampler

        return VLLMServerSampler(folder, policy_id, ctx.recipe.policy, engine_config, sampling, renderer, reference(folder))

    seeded = engine_config.type == "hf" or engine_config.seeded

    def row(s: Sample) -> dict[str, Any]:
        ask = by_id[s.prompt_id]
        seed = ask.seed if seeded else None
        made_by = (s.prompt_id, policy_id, s.sample, seed, vars(sampling), engine_config.type, keys)
        made_by += () if template == "chat" else (template,)
        return {
            "rollout_id": row_id(*made_by), "prompt_id": s.prompt_id, "sample": s.sample, "policy": policy_id,
            "text": s.text, "prompt_tokens": ask.prompt_tokens, "tokens": s.tokens,
            "logprobs": stored_logprobs(s.logprobs, ctx.recipe.rollouts.logprobs),
            "finish_reason": s.finish_reason, "engine": engine_config.type, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": seed, **keys,
        }  # fmt: skip

    return _generate(it, work, engine, row, max_failed, regenerate, refused)


def stored_logprobs(logprobs: Any, kind: str) -> Any:
    """Log-probs as they are stored: as they are, or rounded to float16. The column is float32 either way: the bits that
    rounding clears cost next to nothing on disk, and no reader has to know."""
    return logprobs if kind == "float32" or logprobs is None else np.asarray(logprobs, np.float16).astype(np.float32)


# ---------------------------------------------------------------- both
def _generate(
    it: Spec,
    work: list[Ask],
    make_engine: Callable[[], Engine],
    row: Callable[[Sample], dict[str, Any]],
    max_failed: float,
    regenerate: bool,
    refused: Sequence[Failure] = (),
) -> Outcome:
    """begin -> anti-join -> engine -> parts -> manifest. `refused`: samples that cannot be asked for."""
    started = time.monotonic()
    if not work:
        raise UserError(f"{it.partition.label}: there is no prompt to generate for")
    wanted = [(a.prompt_id, s) for a in work for s in a.samples]
    restore(it)
    if current(it) and not it.partition.loose(it.fingerprint) and finished(it, ("prompt_id", "sample")) >= set(wanted):
        settle(it)
        return nothing(it)
    engine = make_engine()  # a bad setting of the engine is told before anything is moved
    before = found_fingerprint(it.partition)
    begin(it, regenerate=regenerate)
    try:
        return _fill(it, work, wanted, engine, row, max_failed, started, refused)
    except DypoError:
        put_back(it, before)
        raise


def _fill(
    it: Spec,
    work: list[Ask],
    wanted: list[tuple[str, int]],
    engine: Engine,
    row: Callable[[Sample], dict[str, Any]],
    max_failed: float,
    started: float,
    refused: Sequence[Failure],
) -> Outcome:
    """What is missing of `wanted`, from the engine; then the manifest."""
    done = frozenset(finished(it, ("prompt_id", "sample")))
    left = sum(w not in done for w in wanted)
    failures: list[Failure] = list(refused)
    details = ""
    try:
        with progress(it.partition.label, len(wanted), len(wanted) - left) as bar:
            tokens = 0
            for batch in engine.run(work, done) if left else ():
                failures += [s for s in batch if isinstance(s, Failure)]
                samples = [s for s in batch if isinstance(s, Sample)]
                if samples:
                    _write(it.partition, it.fingerprint, [row(s) for s in samples])
                details = next((s.sampling for s in samples if s.sampling != "{}"), details)
                tokens += sum(len(s.tokens or ()) for s in samples)
                rate = f"{tokens / (time.monotonic() - started):,.0f} tok/s" if tokens else ""
                bar.advance(len(batch), rate)
    except (Exception, KeyboardInterrupt):
        with suppress(WorkError):  # a full disk, which is what is told already
            record(it, failures)
        raise
    record(it, failures)
    _judge_failures(it, failures, len(wanted) + len(refused), max_failed)
    if not parts_of(it):
        raise WorkError(f"{it.partition.label}: the engine produced no row at all for {len(wanted)} samples")
    facts: dict[str, Any] = {"note": note} if (note := getattr(engine, "note", "")) else {}
    if details and it.partition.table != "traces":  # traces have a column for it
        facts["sampling"] = json.loads(details)
    outcome = finish(it, failed=len(failures), facts=facts, started=started)
    if outcome.action == "added" and outcome.added == 0 and not failures:
        return nothing(it)
    return outcome


def _readable(folder: Path, renderer: "Renderer", work: list[Ask], max_failed: float) -> tuple[list[Ask], list[Failure]]:
    """The work as the policy's token ids, and the samples whose prompt cannot be that: its tokenizer or template refuses
    it, or it leaves no room for an answer. UserError if they are more than `max_failed` of all.
    """
    config = json.loads((folder / "config.json").read_text())
    context = config.get("text_config", config).get("max_position_embeddings")
    asked: list[Ask] = []
    bad: dict[str, str] = {}
    for ask in work:
        try:
            tokens = renderer.prompt_tokens(ask.messages)
        except UserError as e:
            bad[ask.prompt_id] = str(e)
            continue
        if context and len(tokens) >= context:
            text = ask.messages[-1]["content"][:60]
            bad[ask.prompt_id] = (
                f"{folder}: a prompt of {len(tokens)} tokens does not fit its context of {context}: {text!r}"
            )
        else:
            asked.append(replace(ask, prompt_tokens=tokens))
    if len(bad) > max_failed * len(work):
        prompt_id, why = next(iter(bad.items()))
        raise UserError(
            f"{why}\n{len(bad)} of {len(work)} prompts cannot be asked (at most {max_failed:.0%} may); this is {prompt_id}. "
            "Remove them from their source, or use another policy"
        )
    return asked, [Failure(a.prompt_id, s, bad[a.prompt_id]) for a in work if a.prompt_id in bad for s in a.samples]


def _write(part: Partition, fingerprint: str, rows: list[dict[str, Any]]) -> None:
    part.write(pa.Table.from_pylist(rows, schema=ARROW[part.table]), fingerprint)


def _judge_failures(it: Spec, failures: list[Failure], wanted: int, max_failed: float) -> None:
    if len(failures) > max_failed * wanted:
        first = failures[0]
        raise WorkError(
            f"{it.partition.label}: {len(failures)} of {wanted} samples failed for good (at most {max_failed:.0%} may). "
            f"First: prompt {first.prompt_id}, sample {first.sample}: {first.why}. Finished rows are kept, and table failures "
            "has each reason; run the same command again to try the missing ones"
        )
