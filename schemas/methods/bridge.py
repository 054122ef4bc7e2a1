"""BRIDGE (arXiv 2509.06948): base weights theta and an adapter w on them, trained together; w looks for what makes SFT help RL.

    theta     <-  theta    - a grad [(1 - l) SFT(theta, w) + l PG(theta, w)]
    theta'    <-  theta'   - a grad PG(theta', w)                                            a shadow of theta, on RL alone
    w         <-  w        - b grad [(1 - l) SFT(theta, w) + l (PG(theta, w) - PG(theta', w))]

SFT: mean over the tokens of traces; PG: GRPO, mean over groups of rollouts. PG(theta, w) - PG(theta', w) is what theta falls short of RL
alone; lowering it, w takes the side of cooperation. The policy that acts, and every checkpoint, is theta with w merged in.
Needs: groups of rollouts, traces. Routing: every whole group and every trace of the same prompts. Advantage: std of the group.
Published: l 0.5 (0.3 to 0.7 do as well), lr 5e-7. Rank, alpha, and whether a and b differ are not in our notes: rank 16, alpha 32,
b = a here. clip 0.2, no KL.

From secondary notes (ALGORITHMS section 9), and adapted. Both PG terms are on the same stored rollouts, which theta with w sampled, each with
its own ratio, where an online trainer could sample with the shadow too. The three gradients are all taken at the values before the step,
each goes through an AdamW of its own (the formulas have plain steps) and is clipped by itself. theta, theta', w and all moments go on from
round to round. Costs a second copy of the weights and of their moments, and a second pass over the rollouts. One process.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Routing, Weights
from schemas.methods.terms import GRPO


class BRIDGEMethod(Method):
    """SFT and RL made to cooperate by an adapter, in a bilevel problem (docs/methods/bridge.md)."""

    type: Literal["bridge"]
    lr: float = Field(default=5e-7, gt=0, description="a: of the weights and their shadow")
    adapter_lr: float = Field(default=5e-7, gt=0, description="b: of the adapter")
    rl_weight: float = Field(default=0.5, ge=0, le=1, description="lambda: RL's weight, and the penalty's")
    rank: int = Field(default=16, ge=1, description="of the adapter")
    alpha: int = Field(default=32, ge=1, description="the adapter's output is scaled by alpha / rank")
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, sft=ALL)

    def weights(self, step: int) -> Weights:
        return Weights(sft=1 - self.rl_weight, grpo=self.rl_weight)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo, normalise="own")

    @property
    def rates(self) -> dict[str, float]:
        return {"main": self.lr, "shadow": self.lr, "adapter": self.adapter_lr}
