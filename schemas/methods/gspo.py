"""GSPO (arXiv 2507.18071): one importance ratio a row, the same for each of its tokens.

    L = (1 / B) sum_i -min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)        s_i = exp(mean_t (l_t - old_t))

Needs: groups of rollouts. Routing: every whole group. Advantage: std of the group.
Published: clip 3e-4 and 4e-4 (from memory, ALGORITHMS section 9; DYPO's code runs it with 0.2), lr 1e-6. With
such a clip the sampler's rounding alone can bind: with an engine other than hf set grpo.old = "trainer".
"""

from typing import Literal

from schemas.methods.base import GroupMethod


class GSPOMethod(GroupMethod):
    """Group Sequence Policy Optimization (docs/methods/gspo.md)."""

    PUBLISHED = {"grpo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}}

    type: Literal["gspo"]
