"""Log-probs of stored rows under a model that is not being trained: the reference's, and one response at a time.

One idea: batches are planned from all rows, whatever is finished already, so an interrupted pass ends in bitwise the same
numbers. Left out: the model (model.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from schemas.recipe import Policy
from trainer.batch import pack, plan_micro_batches, split, unit_sizes
from trainer.model import PolicyLM, load_model
from trainer.rows import Row, Shards

REFERENCE_ROWS = 512  # rows in one table of `reference_logprobs`, at least: what a kill can cost


def reference_logprobs(
    model_dir: Path,
    rows: pa.Table,
    policy: Policy,
    micro_batch_tokens: int,
    *,
    finished: frozenset[str] = frozenset(),
) -> Iterator[pa.Table]:
    """Tables (item_id, logprobs, temperature) for the rl rows of a shard table, under the model in a folder.

    Whoever goes on after an interruption passes all rows again and the item ids that are done: batches are planned from all
    rows, so the numbers are bitwise those of an undisturbed run. A table has about REFERENCE_ROWS rows, whole groups.
    """
    shards = Shards(rows, partial=True)
    keys: dict[str, list[tuple[str, str]]] = {}
    for route, prompt, item in sorted(zip(*(rows[n].to_pylist() for n in ("route", "prompt_id", "item_id")), strict=True)):
        if route == "rl":
            keys.setdefault(prompt, []).append((route, item))
    chunk: list[list[tuple[str, str]]] = []
    model: PolicyLM | None = None
    for at, group in enumerate(keys.values(), start=1):
        chunk.append(group)
        if sum(map(len, chunk)) < REFERENCE_ROWS and at < len(keys):
            continue
        if any(item not in finished for unit in chunk for _, item in unit):
            model = model or load_model(model_dir, policy)
            table = _reference_table(model, [shards.rows(unit) for unit in chunk], micro_batch_tokens)
            yield table.filter(pa.array([item not in finished for item in table["item_id"].to_pylist()], pa.bool_()))
        chunk = []


def _reference_table(model: PolicyLM, units: list[list[Row]], micro_batch_tokens: int) -> pa.Table:
    found: dict[str, np.ndarray] = {}
    sizes = unit_sizes(units, share=model.packed)
    for (chosen,) in plan_micro_batches(sizes, micro_batch_tokens):
        together = [row for i in chosen for row in units[i]]
        for start, stop in split(together, micro_batch_tokens, share=model.packed):
            rows = together[start:stop]
            with torch.no_grad():
                logps_BT, _ = model(pack(rows, model.device, share=model.packed))
            for row, logps_T in zip(rows, logps_BT.cpu().numpy(), strict=True):
                found[row.item_id] = logps_T[: len(row.tokens)]
    rows = [row for unit in units for row in unit]
    return pa.table(
        {
            "item_id": pa.array([r.item_id for r in rows], pa.string()),
            "logprobs": pa.array([found[r.item_id] for r in rows], pa.list_(pa.float32())),
            "temperature": pa.array([r.temperature for r in rows], pa.float64()),
        }
    )


def sequence_logprobs(
    model: PolicyLM | Path, prompt_tokens: Sequence[int], tokens: Sequence[int], temperature: float
) -> list[float]:
    """Log-probs of one response, one a token: what an engine's own are checked against. A folder is loaded first.

    ValueError for an empty prompt.
    """
    if not prompt_tokens:
        raise ValueError("the prompt has no tokens, so nothing predicts the first token of the response")
    if not tokens:
        return []
    if isinstance(model, Path):
        model = load_model(model, Policy.model_validate({"model": model}))
    row: Any = SimpleNamespace(prompt_tokens=np.array(prompt_tokens), tokens=np.array(tokens), temperature=temperature)
    with torch.no_grad():
        return model(pack([row], model.device))[0][0].tolist()
