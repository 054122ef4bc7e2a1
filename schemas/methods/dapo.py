"""DAPO (arXiv 2503.14476): GRPO over all tokens alike, a higher upper clip, and only groups with contrast.

    L = (1 / N) sum_i sum_t -min(r A_i, clip(r, 0.8, 1.28) A_i)        N: all response tokens of the update's groups

Needs: groups of rollouts. Routing: Mid groups alone, so a step is always filled (the paper refills a batch instead).
Advantage: std of the group. Rollouts cut at the length limit give no gradient. Published: clip 0.2 and 0.28, lr 1e-6, no KL.
Left out: the soft penalty for overlong answers, which is a reward's affair.
"""

from typing import Literal

from schemas.methods.base import GroupMethod, Routing


class DAPOMethod(GroupMethod):
    """Decoupled clip and dynamic sampling: Mid groups only, mean over tokens (docs/methods/dapo.md)."""

    PUBLISHED = {"grpo": {"clip_high": 0.28, "aggregation": "token-mean", "mask_truncated": True}}

    type: Literal["dapo"]

    def routing(self, round: int) -> Routing:
        return Routing(rl=("mid",))
