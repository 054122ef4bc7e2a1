"""What `dypo plan` says training will hold in memory (pipeline/memory.py) beside what it does hold. Linux, on a CPU.

    python -m tests.bench.sizes                   the table of docs/performance.md, in some minutes
    python -m tests.bench.sizes one FOLDER JSON   one figure, in this process; JSON: arguments of `measure`

One idea: an update is made on one small group first, so that libraries are warm and weights, gradients and moments are all held;
then the high-water mark is reset and one micro-batch is accumulated. What it adds is the working memory: activations and what
comes and goes. It is measured with every large piece given back to the system when freed (EXACT), which is what the estimate is
of, and as glibc does it, which keeps freed pieces for later.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.memory import Group, memory, read_model
from schemas.recipe import DypoMethod, Lora, Optimizer, Policy, Recipe
from tests.bench.machine import peak_mb, reset_peak, resident_mb
from tests.tiny_runs import ROOT

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TINY = ROOT / "data" / "tiny_policy"
PROMPT, LENGTHS = 32, (64, 40, 30, 22, 17, 12, 9, 6)
SHAPES = {  # hidden, layers, intermediate, heads, key heads, vocabulary, tied
    "256 x 4": (256, 4, 688, 4, 4, 512, False),
    "576 x 8": (576, 8, 1536, 9, 3, 49152, True),
}
STATE = ("weights", "gradients", "AdamW moments")


def make_model(shape: str, folder: Path) -> Path:
    """A random Llama of that shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, intermediate, heads, key_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def groups(slots: int, prompt: int) -> int:
    """How many groups make a micro-batch of about so many slots."""
    return max(1, round(slots / (prompt + sum(LENGTHS) - len(LENGTHS))))


def estimate(
    folder: Path, slots: int, checkpointing: bool = False, dtype: str = "float32", prompt: int = PROMPT, rank: int = 0
) -> tuple[float, float]:
    """(state, work) in MB, by pipeline/memory.py."""
    train = {"steps": 1, "prompts_per_step": 1, "gradient_checkpointing": checkpointing}
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "run": "run",
            "policy": {"model": folder, "dtype": dtype, "device": "cpu"},
            "sources": [{"type": "file", "name": "s", "path": "p", "verifier": "v"}],
            "score": {"verifiers": {"v": {"type": "exact"}}},
            "train": train | ({"lora": {"rank": rank}} if rank else {}),
        }
    )
    each = prompt + sum(LENGTHS) - len(LENGTHS)
    group = Group(prompt, sum(LENGTHS) / len(LENGTHS) - 1, len(LENGTHS))
    rows = memory(read_model(folder), recipe, groups(slots, prompt) * each, group)
    state = sum(rows[name] for name in STATE)
    return state / 1e6, (sum(rows.values()) - state) / 1e6


def measure(
    folder: Path, slots: int, checkpointing: bool = False, dtype: str = "float32", prompt: int = PROMPT, rank: int = 0
) -> tuple[float, float]:
    """(state, work) in MB, in this process."""
    import numpy as np

    from tests.trainer.tiny import accumulate_as
    from trainer import adapter
    from trainer.model import load_model, recompute_activations
    from trainer.objective import count
    from trainer.optim import apply_update, build_optimizers, gradient_norm
    from trainer.rows import Row, Shards

    before = resident_mb()
    method = DypoMethod(alpha=1.0)
    policy = Policy.model_validate({"model": folder, "device": "cpu", "threads": 1, "dtype": dtype})
    model = load_model(folder, policy)
    assert model.packed
    if rank:
        adapter.attach(model.lm, Lora(rank=rank), None)
    if checkpointing:
        recompute_activations(model.lm)
    optimizer = build_optimizers(model.lm, method, Optimizer())["main"]
    units: list[list[Row]] = _units(groups(slots, prompt), prompt, read_model(folder).vocabulary, np, Shards)

    def go(units: list[list[Row]]) -> None:
        accumulate_as(model, units, count(units, len(units)), method, micro_batch_tokens=10**9)

    go(units[:1])
    apply_update(optimizer, rate=0.0, clip_norm=1.0, norm=gradient_norm(model.parameters()))
    go(units[:1])
    held = resident_mb()
    reset_peak()
    go(units)
    return (held - before) * 1.048576, (peak_mb() - held) * 1.048576


def _units(number: int, prompt: int, vocabulary: int, np: Any, shards: Any) -> list[Any]:
    import pyarrow as pa

    from schemas.tables import ARROW
    from tests.trainer.tiny import shard_row

    rng = np.random.default_rng(0)
    rows = []
    for g in range(number):
        first = rng.integers(0, vocabulary, prompt).tolist()
        for s, n in enumerate(LENGTHS):
            more = {"reward": float(s % 2), "correct": s % 2 == 1, "advantage": s % 2 - 0.5, "group_size": len(LENGTHS)}
            tokens = rng.integers(0, vocabulary, n).tolist()
            rows.append(shard_row("rl", f"g{g}", s, first, tokens, old_logprobs=[-3.0] * n, **more))
    table = shards(pa.Table.from_pylist(rows, ARROW["shards"]), None)
    return [
        table.rows([("rl", r["item_id"]) for r in rows[at : at + len(LENGTHS)]]) for at in range(0, len(rows), len(LENGTHS))
    ]


def measured(folder: Path, *, exact: bool = True, **what: Any) -> tuple[float, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.sizes", "one", str(folder), json.dumps(what)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(EXACT if exact else {})}
    got = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
    state, work = json.loads(got.stdout.splitlines()[-1])
    return state, work


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        from transformers.utils import logging

        import trainer.step  # noqa: F401  what imports take is not training's

        logging.disable_progress_bar()
        print(json.dumps(measure(Path(sys.argv[2]), **json.loads(sys.argv[3]))))
        return
    print("| model | slots | | estimate, MB | held at once, MB | estimate / held | resident under glibc, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        cases: list[tuple[str, Path, dict[str, Any]]] = []
        for name in ("tiny", *SHAPES):
            folder = TINY if name == "tiny" else make_model(name, Path(root) / name)
            for slots in (1024, 2048 if name == "576 x 8" else 4096):
                for more in ({}, {"checkpointing": True}):
                    cases.append((name, folder, {"slots": slots, **more}))
        folder = cases[4][1]
        cases += [("256 x 4", folder, {"slots": 4096, **more}) for more in (
            {"dtype": "bfloat16"}, {"dtype": "bfloat16", "checkpointing": True}, {"rank": 16}, {"dtype": "float64"}, {"prompt": 8}
        )]  # fmt: skip
        for name, folder, what in cases:
            _, guess = estimate(folder, **what)
            _, held = measured(folder, **what)
            _, kept = measured(folder, exact=False, **what)
            how = ", ".join("checkpointing" if k == "checkpointing" else f"{k} {v}" for k, v in what.items() if k != "slots")
            used = groups(what["slots"], what.get("prompt", PROMPT)) * (
                what.get("prompt", PROMPT) + sum(LENGTHS) - len(LENGTHS)
            )
            print(
                f"| {name} | {used:,} | {how} | {guess:,.0f} | {held:,.0f} | {guess / held:.2f} | {kept:,.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
