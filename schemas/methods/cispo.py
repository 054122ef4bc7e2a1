"""CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio is a constant weight, so no token loses its gradient.

    L = -(1 / N) sum_i sum_t sg(min(r, 5)) A_i log p        N: all response tokens of the update's groups

Needs: groups of rollouts. Routing: every whole group. Advantage: std of the group.
Published: an upper bound only, of 5 as TRL recommends; mean over tokens; lr 1e-6.
"""

from typing import Literal

from schemas.methods.base import GroupMethod


class CISPOMethod(GroupMethod):
    """Clipped importance-sampling policy optimization (docs/methods/cispo.md)."""

    PUBLISHED = {"grpo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"}}

    type: Literal["cispo"]
