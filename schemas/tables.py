"""Every column of every table, declared once. docs/data.md, the Arrow schemas and the DuckDB types come from here.

Public: `ARROW[name]` is a table's Arrow schema, `TABLES[name]` its declaration.
"""

import pyarrow as pa

from schemas.columns import Column, Table
from schemas.scorers import STATUSES

S, I32, I64, F32, F64, B = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()
MESSAGES = pa.list_(pa.field("element", pa.struct([pa.field("role", S, False), pa.field("content", S, False)]), False))
IDS = pa.list_(pa.field("element", I32, nullable=False))
LOGPS = pa.list_(pa.field("element", F32, nullable=False))

REASONS = ("sft", "rl", "easy", "no_verified_trace", "too_long", "unjudged", "incomplete_group", "stale")

C = Column
_round = C("round", I32, "refresh round, from 0")
_prompt = C("prompt_id", S, "sha256 of the prompt's messages (32 hex digits)")
_policy = C("policy", S, "content id of the policy: sha256 over weights, config, tokenizer and chat template")

prompts = Table(
    "prompts",
    "a problem",
    ("prompt_id",),
    (),
    (
        _prompt,
        C("messages", MESSAGES, "the chat so far, last message the user's"),
        C("answer", S, "the gold answer"),
        C("verifier", S, "name of the recipe's verifier that judges answers to it"),
        C("source", S, "name of the recipe's source; eval suites name sources"),
        C("split", S, "train | eval | contaminated; only train prompts reach generate and grade"),
        C("metadata", S, "JSON text: everything else that the source said", nullable=True),
    ),
)

contamination = Table(
    "contamination",
    "a train prompt and an eval prompt that share text",
    ("prompt_id", "eval_prompt_id"),
    (),
    (
        C("prompt_id", S, "the train prompt; its split is `contaminated` if it was dropped"),
        C("eval_prompt_id", S, "the eval prompt"),
        C("source", S, "the train prompt's source"),
        C("eval_source", S, "the eval prompt's source"),
        C("words", I32, "length of the runs of words that were compared"),
        C("run", S, "a run of words that stands in both, in normal form"),
        C("overlap", F64, "share of the eval prompt's runs of that length that stand in the train prompt"),
    ),
)

traces = Table(
    "traces",
    "one sample of one teacher for one prompt",
    ("trace_id",),
    ("teacher",),
    (
        C("trace_id", S, "hash of what made the row"),
        _prompt,
        C("teacher", S, "name of the recipe's teacher"),
        C("sample", I32, "index of the sample, from 0"),
        C("text", S, "the response, without end-of-sequence token"),
        C("finish_reason", S, "stop | length"),
        C("model", S, "what the teacher says it is"),
        C(
            "sampling",
            S,
            "JSON text: temperature, top_p, max_tokens, seed; n if one request gave several; usage of a request, in its first row; recorded: what a replayed file says of the trace",
        ),
    ),
    content=("text",),
)

_rollout = (
    C("rollout_id", S, "hash of what made the row"),
    _prompt,
    _round,
    C("sample", I32, "index within the group, from 0"),
    _policy,
    C("text", S, "the response as text, derived from `tokens` (special tokens left out)"),
    C("prompt_tokens", IDS, "token ids of the rendered prompt"),
    C("tokens", IDS, "token ids of the response, end-of-sequence included when it stopped"),
    C("logprobs", LOGPS, "per token: log softmax(logits / temperature) over the whole vocabulary"),
    C("prompt_length", I32, "number of `prompt_tokens`", counts="prompt_tokens"),
    C("length", I32, "number of `tokens`", counts="tokens"),
    C("finish_reason", S, "stop | length"),
    C("engine", S, "hf | vllm | ..."),
    C("temperature", F64, "sampling temperature; 0 is greedy (eval only)"),
    C("top_p", F64, "1 for training rollouts"),
    C("seed", I64, "the prompt's seed; samples are derived from it; null: not reproducible", nullable=True),
)
rollouts = Table(
    "rollouts", "one sample of the policy for one train prompt", ("rollout_id",), ("round",), _rollout, content=("text",)
)

skips = Table(
    "skips",
    "a group of a round that was not drawn to its end, and what stands for the rest",
    ("round", "prompt_id"),
    ("round",),
    (
        _prompt,
        _round,
        C("source_round", I32, "round whose rollouts stand for the group"),
        C("draws", I32, "rollouts drawn in this round"),
        C("skipped", I32, "rollouts not drawn"),
        C("grade", S, "easy | mid | hard: what the whole group would be graded, or was"),
        C(
            "chance",
            F64,
            "that the whole group gets this grade, as seen when drawing stopped; null: it was whole",
            nullable=True,
        ),
        C("why", S, "sure | unmoved | budget | stale: see rollouts.sequential and rollouts.reuse"),
    ),
)

_step = C("step", I32, "optimizer updates done in the round")
_suite = C("suite", S, "name of the recipe's eval suite")
eval_rollouts = Table(
    "eval_rollouts",
    "one sample of the policy for one eval prompt",
    ("rollout_id",),
    ("round", "step", "suite"),
    (*_rollout, _step, _suite),
    content=("text",),
)

failures = Table(
    "failures",
    "a sample that could not be had; the stage's next run tries it again",
    ("stage", "prompt_id", "sample", "round", "step", "suite", "teacher"),
    ("stage", "round", "step", "suite", "teacher"),
    (
        C("stage", S, "teachers | rollouts | eval_rollouts"),
        C("round", I32, "round of a rollout; null for teachers", nullable=True),
        C("step", I32, "step of an eval rollout, else null", nullable=True),
        C("suite", S, "suite of an eval rollout, else null", nullable=True),
        C("teacher", S, "the teacher, else null", nullable=True),
        _prompt,
        C("sample", I32, "index of the sample, from 0"),
        C("why", S, "the reason"),
        C("when", F64, "seconds since the epoch"),
    ),
)

scores = Table(
    "scores",
    "the verdict on one rollout, trace or eval rollout",
    ("kind", "id"),
    ("kind", "round", "step", "suite", "teacher"),
    (
        C("kind", S, "rollout | trace | eval"),
        C("id", S, "rollout_id or trace_id"),
        _prompt,
        C("round", I32, "round of a rollout; null for traces", nullable=True),
        C("step", I32, "step of an eval rollout, else null", nullable=True),
        C("suite", S, "suite of an eval rollout, else null", nullable=True),
        C("teacher", S, "teacher of a trace, else null", nullable=True),
        C("text_sha", S, "sha256 of the text that was judged (16 hex digits)"),
        C("status", S, " | ".join(STATUSES)),
        C("reward", F64, "the verifier's number; 1 or 0 for the binary ones"),
        C("correct", B, "the verdict that grading counts; true exactly when status is ok"),
        C("extracted", S, "the answer that the verifier found in the text", nullable=True),
        C("verifier", S, "the verifier's name in the recipe, or recorded.COLUMN: a verdict that came with the trace"),
        C("verifier_version", I32, "version of the verifier's code; 0 for recorded verdicts"),
        C("elapsed_ms", F64, "time the verdict took"),
        C("detail", S, "why, for any status but ok and wrong", nullable=True),
    ),
    content=("text_sha", "status", "reward"),
)

grades = Table(
    "grades",
    "the difficulty of one prompt for one policy; no method in it",
    ("round", "prompt_id"),
    ("round",),
    (
        _prompt,
        _round,
        C("source_round", I32, "round whose rollouts were counted"),
        _policy,
        C("k", I32, "rollouts counted"),
        C("successes", I32, "rollouts whose verdict is ok"),
        C("unjudged", I32, "verdicts timeout, error or gold_bad, which count as not correct"),
        C("grade", S, "easy | mid | hard"),
        C("traces", I32, "verified teacher traces that fit the length limit"),
        C("reason", S, "where a gated method sends it, or why nowhere: " + " | ".join(REASONS)),
    ),
)

shards = Table(
    "shards",
    "one sequence to train on: a rollout of a Mid group or a verified trace of a Hard prompt",
    ("round", "route", "item_id"),
    ("round", "route"),
    (
        _round,
        C("source_round", I32, "round that the rollouts came from"),
        C("route", S, "sft | rl"),
        _prompt,
        C("item_id", S, "rollout_id (rl) or trace_id (sft)"),
        C("sample", I32, "the rollout's or trace's sample index"),
        C("teacher", S, "teacher of a trace; null for rl", nullable=True),
        _policy,
        C("temperature", F64, "temperature to apply to the logits: the rollouts' for rl, 1 for sft"),
        C("prompt_tokens", IDS, "token ids of the rendered prompt"),
        C("tokens", IDS, "token ids of the response; sft targets end with end-of-sequence"),
        C("old_logprobs", LOGPS, "the sampler's log-probs; null for sft", nullable=True),
        C("finish_reason", S, "stop | length"),
        C(
            "reward",
            F64,
            "the verifier's number; of a rollout in a round that is rated (method prism), its score in `ratings`",
        ),
        C("correct", B, "the verdict; GAL's pairs are correct against not correct"),
        C(
            "advantage",
            F64,
            "(reward - group mean) / (group std + eps), std over k - 1, unless the method or an adjustment has its own; 0 for a trace in no group",
        ),
        C(
            "group_size",
            I32,
            "members of the group: its rollouts, and the trace if the method makes it one; 1 for a trace in none",
        ),
        C("w_sft", F64, "gate times adjustments and curriculum for the SFT term; never alpha, gamma or a denominator"),
        C("w_grpo", F64, "the same for GRPO"),
        C("w_gal", F64, "the same for GAL"),
    ),
)

ratings = Table(
    "ratings",
    "a discriminator's score of one rollout or trace: how much it reads like the teachers' text",
    ("round", "kind", "item_id"),
    ("round",),
    (
        _round,
        _prompt,
        C("kind", S, "rollout | trace"),
        C("item_id", S, "rollout_id or trace_id"),
        C("score", F64, "D of its tokens; comparable within a fold"),
        C("fold", I32, "0 | 1: the half of the prompts that this one is in; the discriminator learned from the other"),
        C("model", S, "content id of the discriminator"),
    ),
    content=("score",),
)

logprobs = Table(
    "logprobs",
    "per-token log-probs of one shard row under a model that is not being trained",
    ("round", "role", "item_id"),
    ("round", "role"),
    (
        _round,
        C(
            "role",
            S,
            "old: the policy that sampled, in the trainer's forward | ref: the run's base policy | teacher: the distilled one",
        ),
        C("item_id", S, "the shard row"),
        C("model", S, "content id of the model"),
        C("temperature", F64, "temperature applied to the logits"),
        C("logprobs", LOGPS, "one per response token"),
    ),
)

draws = Table(
    "draws",
    "one sequence in one optimizer step: what the step was trained on",
    ("round", "step", "position"),
    ("round",),
    (
        _round,
        C("step", I32, "optimizer step within the round, from 0"),
        C("position", I32, "place within the step"),
        C("item_id", S, "the shard row"),
        _prompt,
        C("route", S, "sft | rl"),
        C("teacher", S, "the teacher drawn; null for rl", nullable=True),
        C("age", I32, "rounds between sampling and training"),
        C(
            "log_ratio",
            F64,
            "mean over the tokens of log-prob now minus stored old one; null for sft, and for groups without a gradient, which were not run",
            nullable=True,
        ),
        C("kl", F64, "mean over the tokens of ratio - 1 - log ratio (k3); null for sft", nullable=True),
        C(
            "clip_fraction",
            F64,
            "share of the tokens (ratio = sequence: the row, 0 or 1) clipped; null for sft",
            nullable=True,
        ),
    ),
)

metrics = Table(
    "metrics",
    "one number of one optimizer step",
    ("round", "step", "name"),
    ("round",),
    (
        _round,
        C("step", I32, "optimizer step within the round, from 0"),
        C("name", S, "docs/metrics.md lists them"),
        C("value", F64, "the number"),
        C("when", F64, "seconds since the epoch"),
    ),
)

evals = Table(
    "evals",
    "one metric of one policy on one suite",
    ("round", "step", "suite", "metric"),
    ("round", "step", "suite"),
    (
        _round,
        _step,
        _suite,
        C("metric", S, "avg@n, pass@k, maj@n"),
        C("value", F64, "between 0 and 1"),
        C("ci_low", F64, "lower end of the 95 % interval over problems (docs/evaluation.md)"),
        C("ci_high", F64, "upper end"),
        C("problems", I32, "problems in the suite"),
        _policy,
    ),
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        prompts,
        contamination,
        traces,
        rollouts,
        skips,
        failures,
        scores,
        grades,
        ratings,
        shards,
        logprobs,
        draws,
        metrics,
        eval_rollouts,
        evals,
    )
}
ARROW: dict[str, pa.Schema] = {name: table.arrow() for name, table in TABLES.items()}


def data_md() -> str:
    """docs/data.md, whole. `make docs` writes it; a test compares."""
    head = (
        "# Tables\n\nRendered from `schemas/tables.py` by `make docs`; do not edit. Every file carries the table's "
        "name and schema version\nin its Parquet metadata. `dypo sql RUN QUERY` has one view for each table, plus "
        "`score_versions` (older verdicts included).\n\n"
    )
    return head + "\n".join(t.markdown() for t in TABLES.values())
