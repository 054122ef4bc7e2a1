"""GRPO (DeepSeekMath, arXiv 2402.03300), as verl codes it: no KL by default.

    L = (1 / B) sum_i (1 / T_i) sum_t -min(r A_i, clip(r, 0.8, 1.2) A_i)        A_i = (R_i - mean) / (std + eps)

Needs: groups of rollouts. Routing: every whole group; one without contrast gives no gradient and counts in B, as published.
Advantage: std of the group. Published: clip 0.2, lr 1e-6.
"""

from typing import Literal

from schemas.methods.base import GroupMethod


class GRPOMethod(GroupMethod):
    """Group Relative Policy Optimization on every group (docs/methods/grpo.md)."""

    type: Literal["grpo"]
