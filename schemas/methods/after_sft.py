"""Rounds of SFT before all others: what sft_then_rl and prism have in common.

One idea: a stage is what a run of its own would be, so the SFT rounds have an optimizer, a rate, a warm-up and a decay of their own,
and draw no rollouts. Left out: what comes after them.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import Loss, Method, Stage, Weights
from schemas.methods.terms import GRPO


class AfterSFT(Method):
    """SFT in the first rounds, a policy gradient afterwards."""

    sft_rounds: int = Field(default=1, ge=1, description="rounds of SFT before the first with rollouts")
    sft_lr: float = Field(default=5e-5, gt=0)
    sft_decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="over the SFT rounds; train.optimizer's is that of each later stage"
    )
    sft_warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the SFT steps")
    grpo: GRPO = GRPO()

    @property
    def rounds_before_rl(self) -> int:
        """How many rounds there are before the first of RL."""
        return self.sft_rounds

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0, grpo=1.0)  # a round has rows of one kind only

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)

    @property
    def rates(self) -> dict[str, float]:
        return {"main": self.lr, "sft": self.sft_lr}

    def unused(self, round: int) -> frozenset[str]:
        other = {"lr", "grpo"} if round < self.sft_rounds else {"sft_lr", "sft_decay", "sft_warmup"}
        return super().unused(round) | other

    def stage(self, round: int, rounds: int) -> Stage:
        if round < self.sft_rounds:
            return Stage(0, self.sft_rounds, "sft", self.sft_decay, self.sft_warmup)
        return Stage(self.sft_rounds, rounds - self.sft_rounds)
