"""Dr.GRPO (arXiv 2503.20783): GRPO without the two divisions that bias it, by the group's std and by each row's length.

    L = (1 / B) sum_i (1 / H) sum_t -min(r A_i, clip(r, 0.8, 1.2) A_i)        A_i = R_i - mean,  H constant

Needs: groups of rollouts. Routing: every whole group. Advantage: centred, not divided by the std.
Published: clip 0.2, lr 1e-6; H is the length limit of the rollouts: 8192 as in LUFFY's and HPT's code; set it to yours.
"""

from typing import Literal

from schemas.methods.base import GroupMethod


class DrGRPOMethod(GroupMethod):
    """GRPO with centred advantages and a constant horizon (docs/methods/dr_grpo.md)."""

    PUBLISHED = {"grpo": {"advantage": "none", "aggregation": "seq-mean-token-sum-norm", "horizon": 8192}}

    type: Literal["dr_grpo"]
