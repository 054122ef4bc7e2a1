"""Rows -> micro-batches of padded tensors.

Axes: B rows, L input tokens (prompt and response but its last token, which predicts nothing), T response tokens.
One idea: a unit (a whole group, or one sft row) is never split, since GAL needs its group in one piece. Units are sorted
by length and packed into micro-batches of at most `micro_batch_tokens` slots, B * L; a unit that is larger runs alone.
Padding is on the right, where causal attention cannot see it, so no attention mask is needed.
Left out: sharing a group's prompt and packing without padding. They would replace this file and forward.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.rows import Row


@dataclass(frozen=True)
class Sequences:
    """What a forward needs. Response arrays start at column 0; `mask_BT` says how far each row goes."""

    input_ids_BL: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    first_B: Tensor  # input position that predicts the first response token
    temperature_B: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(-1)


def plan_micro_batches(units: Sequence[Sequence[Row]], micro_batch_tokens: int) -> list[list[int]]:
    """Indices of units by micro-batch, longest units first. Every unit is in exactly one."""
    longest = [max(len(r.prompt_tokens) + len(r.tokens) - 1 for r in unit) for unit in units]
    batches: list[list[int]] = []
    rows = width = 0
    for at in sorted(range(len(units)), key=lambda i: -longest[i]):
        if not batches or (rows + len(units[at])) * width > micro_batch_tokens:
            batches.append([])
            rows, width = 0, longest[at]  # sorted, so the first unit is the widest
        batches[-1].append(at)
        rows += len(units[at])
    return batches


def sequences(rows: Sequence[Row], device: torch.device | str = "cpu") -> Sequences:
    """The padded tensors of some rows, in their order."""
    firsts = [len(r.prompt_tokens) - 1 for r in rows]
    inputs = [np.concatenate([r.prompt_tokens, r.tokens[:-1]]) for r in rows]
    mask_BT = padded([np.ones(len(r.tokens), dtype=bool) for r in rows])
    return Sequences(
        input_ids_BL=padded(inputs).to(device),
        targets_BT=padded([r.tokens for r in rows]).to(device),
        mask_BT=mask_BT.to(device),
        first_B=torch.tensor(firsts, device=device),
        temperature_B=torch.tensor([r.temperature for r in rows], dtype=torch.float64, device=device),
    )


def padded(arrays: Sequence[np.ndarray]) -> Tensor:
    """[len(arrays), longest], right-padded with 0 (False)."""
    out = np.zeros((len(arrays), max(len(a) for a in arrays)), dtype=arrays[0].dtype)
    for at, array in enumerate(arrays):
        out[at, : len(array)] = array
    return torch.from_numpy(out)
