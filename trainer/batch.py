"""Rows -> packed micro-batches: no padding, and a group's prompt once.

Axes: S token slots of one packed row, N response tokens (row by row), U distinct slots that predict one, B rows, T tokens of
the longest response. One packed row is a string of blocks, and a block is a prompt with the responses to it:

    slots       p p p p  a a a  b b  c c c c | p p  a a a | ...
    positions   0 1 2 3  4 5 6  4 5  4 5 6 7 | 0 1  2 3 4 | ...

A response's last token predicts nothing and has no slot; its first is predicted by the prompt's last slot, which a whole
group shares. Who may look at whom follows from the blocks alone (attention.py): the prompt at itself, a response at its
prompt and itself, never at a sibling or another block.
One idea: a unit (a whole group, or one sft row) is what a step is made of; its size in slots is all that planning needs.
Left out: the attention, the model, and what is done with log-probs.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from trainer.rows import Row

Plan = list[list[list[int]]]  # micro-batches, each one list of unit indices for every rank


@dataclass(frozen=True)
class Block:
    """A prompt and the responses to it: `prompt` slots from `start`, then `responses[i]` slots for each in turn."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Batch:
    """What a forward needs. Response arrays [B, T] start at column 0; `mask_BT` says how far each row goes."""

    blocks: tuple[Block, ...]
    input_ids_S: Tensor
    positions_S: Tensor
    slot_U: Tensor  # ascending; a slot is there once for each temperature that it is read at
    temperature_U: Tensor
    at_N: Tensor  # which of U predicts the token
    target_N: Tensor
    mask_BT: Tensor

    @property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(-1)

    def by_row(self, values_N: Tensor) -> Tensor:
        """[B, T] from one value a response token; 0 where there is none. Differentiable."""
        return values_N.new_zeros(self.mask_BT.shape).masked_scatter(self.mask_BT, values_N)


def pack(rows: Sequence[Row], device: torch.device | str = "cpu", *, share: bool = True) -> Batch:
    """The rows in their order as one packed row. share: neighbours with the same prompt become one block."""
    blocks: list[Block] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    start = 0
    for members in _by_prompt(rows, share):
        prompt = members[0].prompt_tokens
        block = Block(start, len(prompt), tuple(len(row.tokens) - 1 for row in members))
        blocks.append(block)
        ids += [prompt, *(row.tokens[:-1] for row in members)]
        positions += [np.arange(len(prompt)), *(np.arange(n) + len(prompt) for n in block.responses)]
        last = start + len(prompt) - 1
        at = last + 1
        for length in block.responses:
            slots.append(np.concatenate([[last], np.arange(at, at + length)]))
            at += length
        start = block.stop
    temperatures = np.repeat([row.temperature for row in rows], [len(row.tokens) for row in rows])
    read, at_N = np.unique(np.concatenate(slots) + 1j * temperatures, return_inverse=True)  # by slot, then by temperature
    return Batch(
        blocks=tuple(blocks),
        input_ids_S=torch.from_numpy(np.concatenate(ids)).to(device),
        positions_S=torch.from_numpy(np.concatenate(positions)).to(device),
        slot_U=torch.from_numpy(read.real.astype(np.int64)).to(device),
        temperature_U=torch.from_numpy(read.imag.copy()).to(device),
        at_N=torch.from_numpy(at_N).to(device),
        target_N=torch.from_numpy(np.concatenate([row.tokens for row in rows])).to(device),
        mask_BT=padded([np.ones(len(row.tokens), dtype=bool) for row in rows]).to(device),
    )


def slots(rows: Sequence[Row], *, share: bool = True) -> int:
    """How many token slots run for these rows: what `pack` lays out, or without sharing each row padded to the longest."""
    if not share:
        return len(rows) * max(len(row.prompt_tokens) + len(row.tokens) - 1 for row in rows)
    prompts = sum(len(members[0].prompt_tokens) for members in _by_prompt(rows, share))
    return prompts + sum(len(row.tokens) - 1 for row in rows)


def unit_sizes(units: Sequence[Sequence[Row]], *, share: bool = True) -> list[int]:
    """The slots of each unit, such that units together take at most their sum: padded rows count as the longest of all."""
    if share or not units:
        return [slots(unit) for unit in units]
    longest = max(slots([row], share=False) for unit in units for row in unit)
    return [len(unit) * longest for unit in units]


def plan_micro_batches(sizes: Sequence[int], budget: int, ranks: int = 1) -> Plan:
    """Units of these sizes as micro-batches of at most `budget` slots on each rank, balanced; every unit is in exactly one.

    A unit larger than the budget is alone in its place. A rank's list may be empty when there are too few units.
    """
    count = max(1, math.ceil(sum(min(size, budget) for size in sizes) / (budget * ranks)))
    while True:
        bins = _balanced(sizes, count * ranks)
        if all(load <= budget or len(units) == 1 for load, units in bins):
            break
        count += 1
    ordered = [units for _, units in sorted(bins, key=lambda b: (-b[0], b[1]))]  # ranks work on like sizes at a time
    return [ordered[at : at + ranks] for at in range(0, len(ordered), ranks)]


def _balanced(sizes: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """(load, units) of `count` bins: largest unit first, each into the bin with the least in it."""
    heap: list[tuple[int, int]] = [(0, at) for at in range(count)]
    units: list[list[int]] = [[] for _ in range(count)]
    for unit in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, at = heapq.heappop(heap)
        units[at].append(unit)
        heapq.heappush(heap, (load + sizes[unit], at))
    return [(load, units[at]) for load, at in heap]


def split(rows: Sequence[Row], budget: int, *, share: bool = True) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of one unit that fit the budget: one piece, but for a unit that is larger."""
    pieces, start = [], 0
    for stop in range(1, len(rows) + 1):
        if stop - start > 1 and slots(rows[start:stop], share=share) > budget:
            pieces.append((start, stop - 1))
            start = stop - 1
    return [*pieces, (start, len(rows))]


def _by_prompt(rows: Sequence[Row], share: bool) -> list[list[Row]]:
    """The rows of each block: neighbours with one prompt, or each row alone."""
    if not share:
        return [[row] for row in rows]
    return [list(same) for _, same in groupby(rows, key=lambda row: row.prompt_tokens.tobytes())]


def padded(arrays: Sequence[np.ndarray]) -> Tensor:
    """[len(arrays), longest], right-padded with 0 (False)."""
    out = np.zeros((len(arrays), max(len(a) for a in arrays)), dtype=arrays[0].dtype)
    for at, array in enumerate(arrays):
        out[at, : len(array)] = array
    return torch.from_numpy(out)
