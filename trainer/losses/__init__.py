"""The losses: pure functions over token log-probs and shard columns, one objective a file.

No model, no recipe, no logging in here. Everything is minimised. A loss returns a sum or a per-token value; whoever
calls it brings the denominator, computed over the whole optimizer step (trainer/objective.py). docs/losses.md has the
formulas beside these names.
"""

from trainer.losses.advantages import grpo_advantages
from trainer.losses.alignment import group_alignment, pair_margins
from trainer.losses.divergence import k3
from trainer.losses.supervised import sft
from trainer.losses.surrogate import cispo, clipped_surrogate, sequence_surrogate
from trainer.losses.truncation import truncated_weights

__all__ = [
    "cispo",
    "clipped_surrogate",
    "group_alignment",
    "grpo_advantages",
    "k3",
    "pair_margins",
    "sequence_surrogate",
    "sft",
    "truncated_weights",
]
