"""Log-probs of response tokens under a Hugging Face causal LM.

    logp_t = log softmax(logits_t / temperature)[token_t], over the whole vocabulary, in float32 at least

One idea: the model is only ever asked for the positions that predict a response token. Weights are float32 masters (an
AdamW step of 1e-6 vanishes in bfloat16); policy.dtype bfloat16 means autocast around the forward. The model stays in eval
mode: dropout would make the ratio to the stored log-probs noise.
Left out: chunking over the vocabulary, packing, gradient checkpointing.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from schemas.errors import UserError
from schemas.recipe import Policy
from trainer.batch import Sequences, plan_micro_batches, sequences
from trainer.rows import Row, Shards

REFERENCE_ROWS = 512  # rows in one table of `reference_logprobs`, at least: what a kill can cost


def load_model(folder: Path, policy: Policy) -> nn.Module:
    """The causal LM of an HF folder, float32, on the policy's device; sets torch's threads if the policy names a number.

    UserError if there is no such folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder (weights as safetensors)")
    if policy.threads is not None:
        torch.set_num_threads(policy.threads)
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    model = cast(nn.Module, loaded)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it would drop the pad token's gradient, and many policies pad with a token they use
    return model.to(device_of(policy)).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers inside: progress is told by the sink."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def device_of(policy: Policy) -> str:
    """cpu or cuda; `auto` takes cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if policy.device == "auto" else policy.device


def response_logps(model: nn.Module, batch: Sequences, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """(logps_BT, entropy_BT) of the response tokens; 0 where batch.mask_BT is False. Entropy carries no gradient.

    In nats, at each row's temperature; float32, or float64 for a float64 model.
    """
    row_N, step_N = batch.mask_BT.nonzero(as_tuple=True)
    position_N = batch.first_B[row_N] + step_N
    wanted_P, at_N = position_N.unique(return_inverse=True)
    with torch.autocast(batch.input_ids_BL.device.type, torch.bfloat16, enabled=autocast):
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits_BPV = model(input_ids=batch.input_ids_BL, use_cache=False, logits_to_keep=wanted_P).logits
        else:
            logits_BPV = model(input_ids=batch.input_ids_BL, use_cache=False).logits[:, wanted_P]
    logits_NV = logits_BPV[row_N, at_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logits_NV = logits_NV / batch.temperature_B[row_N].to(logits_NV.dtype).unsqueeze(-1)
    total_N = logits_NV.logsumexp(-1)
    logps_N = logits_NV.gather(-1, batch.targets_BT[row_N, step_N].unsqueeze(-1)).squeeze(-1) - total_N
    with torch.no_grad():
        probs_NV = (logits_NV - total_N.unsqueeze(-1)).exp_()
        entropy_N = total_N - (probs_NV * logits_NV).sum(-1)
    empty_BT = logps_N.new_zeros(batch.mask_BT.shape)
    return empty_BT.index_put((row_N, step_N), logps_N), empty_BT.index_put((row_N, step_N), entropy_N)


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
    shards = Shards(rows, None)
    keys: dict[str, list[tuple[str, str]]] = {}
    for route, prompt, item in sorted(zip(*(rows[n].to_pylist() for n in ("route", "prompt_id", "item_id")), strict=True)):
        if route == "rl":
            keys.setdefault(prompt, []).append((route, item))
    chunk: list[list[tuple[str, str]]] = []
    model: nn.Module | None = None
    for at, group in enumerate(keys.values(), start=1):
        chunk.append(group)
        if sum(map(len, chunk)) < REFERENCE_ROWS and at < len(keys):
            continue
        if any(item not in finished for unit in chunk for _, item in unit):
            model = model or load_model(model_dir, policy)
            table = _reference_table(model, [shards.rows(unit) for unit in chunk], policy, micro_batch_tokens)
            yield table.filter(pa.array([item not in finished for item in table["item_id"].to_pylist()], pa.bool_()))
        chunk = []


def _reference_table(model: nn.Module, units: list[list[Row]], policy: Policy, micro_batch_tokens: int) -> pa.Table:
    found: dict[str, np.ndarray] = {}
    for at in plan_micro_batches(units, micro_batch_tokens):
        rows = [row for i in at for row in units[i]]
        batch = sequences(rows, device_of(policy))
        with torch.no_grad():
            logps_BT, _ = response_logps(model, batch, autocast=policy.dtype == "bfloat16")
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
    model: nn.Module | Path, prompt_tokens: Sequence[int], tokens: Sequence[int], temperature: float
) -> list[float]:
    """Log-probs of one response, one a token: what an engine's own are checked against. A folder is loaded first.

    ValueError if the prompt is empty, since nothing would predict the first token.
    """
    if not prompt_tokens:
        raise ValueError("the prompt has no tokens, so nothing predicts the first token of the response")
    if not tokens:
        return []
    forward = load_model(model, Policy.model_validate({"model": model})) if isinstance(model, Path) else model
    device = str(next(iter(forward.parameters())).device)
    batch = Sequences(
        input_ids_BL=torch.tensor([[*prompt_tokens, *tokens[:-1]]], device=device),
        targets_BT=torch.tensor([list(tokens)], device=device),
        mask_BT=torch.ones(1, len(tokens), dtype=torch.bool, device=device),
        first_B=torch.tensor([len(prompt_tokens) - 1], device=device),
        temperature_B=torch.tensor([temperature], dtype=torch.float64, device=device),
    )
    with torch.no_grad():
        return response_logps(forward, batch)[0][0].tolist()
