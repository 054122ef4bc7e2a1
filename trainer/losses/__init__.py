"""The losses: pure functions over token log-probs and shard columns, one objective a file.

No model, no recipe, no logging in here. Everything is minimised. A loss returns a sum or a per-token value; whoever
calls it brings the denominator, computed over the whole optimizer step (trainer/objective.py). docs/losses.md has the
formulas beside these names.
"""

from trainer.losses.advantages import grpo_advantages
from trainer.losses.alignment import flat_alignment, group_alignment, pair_margins
from trainer.losses.divergence import k3
from trainer.losses.off_policy import off_policy_surrogate
from trainer.losses.supervised import sft
from trainer.losses.surrogate import cispo, clipped_surrogate, self_surrogate, sequence_surrogate, unclipped_surrogate
from trainer.losses.token_weights import entropy_weights, phi_weights
from trainer.losses.truncation import truncated_weights

__all__ = [
    "cispo",
    "clipped_surrogate",
    "entropy_weights",
    "flat_alignment",
    "group_alignment",
    "grpo_advantages",
    "k3",
    "off_policy_surrogate",
    "pair_margins",
    "phi_weights",
    "self_surrogate",
    "sequence_surrogate",
    "sft",
    "truncated_weights",
    "unclipped_surrogate",
]
