"""The contract between the generate stages and whoever writes text.

The stage hands an engine the whole work list and the set of samples that are finished already; the engine yields
lists of samples, and each list becomes one part file, so a list is what a kill can cost. Planning batches from the
whole list (not from what is left) is what lets `hf` end bitwise in the same table after any interruption.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Ask:
    """One prompt and the indices of the samples wanted. `prompt_tokens` are the policy's (None for teachers)."""

    prompt_id: str
    messages: list[dict[str, str]]
    samples: tuple[int, ...]
    seed: int
    answer: str
    metadata: dict[str, Any]
    prompt_tokens: list[int] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the policy is sampled; temperature 0 is greedy (evaluation only)."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """One answer. Policy engines give `tokens` (end-of-sequence included if it stopped) and `logprobs`, of one length."""

    prompt_id: str
    sample: int
    text: str
    finish_reason: str
    model: str = ""
    sampling: str = "{}"
    tokens: list[int] | None = None
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Failure:
    """A sample that could not be had, and why: a row of table `failures`, and the next run tries again."""

    prompt_id: str
    sample: int
    why: str


Finished = frozenset[tuple[str, int]]


class Engine(Protocol):
    """Who writes text. `seeded` says whether the rows may carry their seed."""

    name: str
    seeded: bool

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """Yields the samples asked for and not in `finished`; each list is durable as one part file."""
        ...
