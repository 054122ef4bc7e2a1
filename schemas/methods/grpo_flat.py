"""grpo_flat: DYPO with GAL's pairs replaced by a constant weight a group. The control that says whether the pairwise form adds anything.

    L = (n_hard / n) gamma SFT + (n_mid / n) (alpha GRPO + (1 - alpha) flat)
    flat of a group = -(beta / 2) (mean over right ones - mean over wrong ones) of the length-mean log-prob

which is GAL where every pair's sigmoid is 1/2, as it is against the sampling policy on-policy (ALGORITHMS section 1, 7.3 row 20).
Needs, routing, advantage: DYPO's. alpha = 0: the constant weight alone. Ours; nothing is published.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import Grade, Loss, Method, Routing, Weights
from schemas.methods.terms import GAL, GRPO


class GRPOFlatMethod(Method):
    """DYPO's control: a constant weight for each Mid group (docs/methods/grpo_flat.md)."""

    type: Literal["grpo_flat"]
    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of GRPO; 1 - alpha is the flat term's")
    beta: float = Field(default=1.0, gt=0, description="GAL's: the flat term is beta / 2 times the difference of means")
    gamma: float = Field(default=1.0, ge=0, description="weight of SFT")
    supervise: tuple[Grade, ...] = Field(default=("hard",), description="grades whose traces are supervised")
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=("mid",), sft=self.supervise)

    def weights(self, step: int) -> Weights:
        return Weights(self.gamma, self.alpha, 1 - self.alpha)

    @property
    def loss(self) -> Loss:
        return Loss(self.grpo, GAL(form="flat", ref="none", beta=self.beta) if self.alpha < 1 else None)
