"""Ratings: each rollout of a round scored by a discriminator that has not seen its prompt, as rows.

One idea: two folds. The prompts are halved by a hash; one discriminator learns from each half and rates the other one, since
a discriminator has memorised what it learned from: in its own sample it tells any two sets of texts apart. All of a group is rated by
one discriminator, so its scores compare. Each learns from at most `prompts` prompts, which is all that is held; the
round goes by as a stream. Left out: where sequences come from (grading.py), the discriminator (discriminator.py).
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.discriminator import Features, features, fit, model_id, score
from schemas.ids import seed_from
from schemas.methods.terms import Discriminator
from schemas.tables import ARROW

Rows = Iterable[pa.RecordBatch]  # prompt_id, kind, item_id, tokens; those of a prompt together


@dataclass(frozen=True)
class Member:
    """One sequence of a prompt: kind is rollout or trace."""

    prompt_id: str
    kind: str
    item_id: str
    phi: Features


@dataclass
class Rating:
    """One round's ratings. facts, once `rows` has come to its end: how often a trace outscored a rollout of its prompt."""

    settings: Discriminator
    seed: int
    round: int
    facts: dict[str, Any] = field(default_factory=dict)

    def fold(self, prompt_id: str) -> int:
        return seed_from("fold", self.seed, self.round, prompt_id) % 2

    def chosen(self, prompt_ids: Iterable[str]) -> list[str]:
        """The prompts to learn from: of each fold so many, by a hash."""
        kept: list[list[tuple[int, str]]] = [[], []]  # heaps, the largest hash first
        for prompt_id in prompt_ids:
            heap = kept[self.fold(prompt_id)]
            heapq.heappush(heap, (-seed_from("learn", self.seed, self.round, prompt_id), prompt_id))
            if len(heap) > self.settings.prompts:
                heapq.heappop(heap)
        return sorted(prompt_id for heap in kept for _, prompt_id in heap)

    def rows(self, learned_from: Rows, all: Callable[[], Rows]) -> Iterator[pa.RecordBatch]:
        """Rows of table ratings: fits on the sequences of the chosen prompts, then rates all."""
        folds: list[list[tuple[list[Features], list[Features]]]] = [[], []]
        for prompt_id, members in self._by_prompt(learned_from):
            traces, rollouts = ([m.phi for m in members if m.kind == kind] for kind in ("trace", "rollout"))
            folds[self.fold(prompt_id)].append((traces, rollouts))
        models = [fit(prompts, self.settings) for prompts in reversed(folds)]  # that of the other fold
        names = [model_id(w, self.settings) for w in models]
        outscored, prompts = 0.0, 0
        for prompt_id, members in self._by_prompt(all()):
            at = self.fold(prompt_id)
            scores = [score(m.phi, models[at]) for m in members]
            outscored, prompts = outscored + _outscored(members, scores), prompts + 1
            n = len(members)
            columns = [[self.round] * n, [prompt_id] * n, [m.kind for m in members], [m.item_id for m in members]]
            columns += [scores, [at] * n, [names[at]] * n]
            yield pa.record_batch(columns, schema=ARROW["ratings"])
        self.facts = {"prompts": prompts, "trace_outscores": outscored / prompts if prompts else None}

    def _by_prompt(self, rows: Rows) -> Iterator[tuple[str, list[Member]]]:
        for prompt_id, members in groupby(self._each(rows), key=lambda member: member.prompt_id):
            yield prompt_id, list(members)

    def _each(self, rows: Rows) -> Iterator[Member]:
        for batch in rows:
            keys = zip(*(batch[name].to_pylist() for name in ("prompt_id", "kind", "item_id")), strict=True)
            for (prompt_id, kind, item_id), tokens in zip(keys, batch["tokens"], strict=True):
                yield Member(prompt_id, kind, item_id, features(np.asarray(tokens.values), self.settings))


def _outscored(members: list[Member], scores: list[float]) -> float:
    """The share of a prompt's pairs in which the trace has the higher score; a tie is half."""
    of_kind = [[s for m, s in zip(members, scores, strict=True) if m.kind == kind] for kind in ("trace", "rollout")]
    pairs = [(t > r) + (t == r) / 2 for t in of_kind[0] for r in of_kind[1]]
    return sum(pairs) / len(pairs)
