"""SuperRL (arXiv 2506.01096): RL where any rollout is right, else SFT, prompt by prompt.

    L = c(x) PG + (1 - c(x)) SFT        c(x) = 1 if some R_i > 0

Needs: groups of rollouts, traces of Hard prompts. Routing: Easy and Mid groups to RL, Hard prompts to SFT; no hyperparameter.
Advantage: the backbone's, GRPO's std. Published: the backbone's settings (clip 0.2; lr 1e-6). The authors' repository seems to
gate whole batches on the mean advantage; this is the paper's gate of each prompt. From secondary notes (ALGORITHMS section 9).
"""

from typing import Literal

from schemas.methods.base import Loss, Method, Routing, Weights
from schemas.methods.terms import GRPO


class SuperRLMethod(Method):
    """A hard switch from RL to SFT where no rollout is right (docs/methods/superrl.md)."""

    type: Literal["superrl"]
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=("easy", "mid"), sft=("hard",))

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0, grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)
