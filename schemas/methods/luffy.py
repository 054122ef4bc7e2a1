"""LUFFY (arXiv 2504.14945): each group has a teacher's trace as one more, off-policy, member.

    on-policy tokens     -r A_i                          not clipped
    the trace's tokens   -f(p) A,  f(p) = p / (p + shaping)      df / d log p = shaping p / (p + shaping)^2, at most 1/4, at p = shaping
    L = (1 / B) sum over the k + 1 members of a group, summed over tokens / horizon

Needs: groups of rollouts, a trace of each prompt (a group without one is the rollouts alone). Routing: every whole group and,
beside it, its trace. Advantage: over the union of rollouts and trace, centred, not divided by the std (code; paper Eq. 4 divides).
Published: shaping 0.1, lr 1e-6, horizon 8192; groups of 7 rollouts and 1 trace: here the k rollouts that are stored and 1.
Left out: the entropy bonus (0.001 in the script, 0.01 in the paper).
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, GroupMethod, Loss, Routing
from schemas.methods.terms import UNCLIPPED_SUM


class LUFFYMethod(GroupMethod):
    """Off-policy guidance: a trace as a member of the group (docs/methods/luffy.md)."""

    PUBLISHED = UNCLIPPED_SUM

    type: Literal["luffy"]
    shaping: float = Field(default=0.1, gt=0, description="gamma of f(p) = p / (p + gamma)")

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, union=True)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo, off_policy="shaped", shaping=self.shaping)
