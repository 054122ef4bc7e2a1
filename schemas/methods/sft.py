"""SFT: every prompt that has a verified trace is supervised on one. The corrected recipe of arXiv 2604.23747.

    L = -(1 / N) sum over response tokens of log p        N: all response tokens of the update, EOS included

Needs: traces. It reads no rollouts, so a round draws none. Routing: all prompts with a trace. Advantage: none.
Published: lr 5e-5 with cosine decay to 0.1 of it and 10 % warm-up, 3 epochs, batch 64.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Routing, Stage, Weights


class SFTMethod(Method):
    """Supervised fine-tuning on verified traces (docs/methods/sft.md)."""

    type: Literal["sft"]
    lr: float = Field(default=5e-5, gt=0)
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="over the run's steps, to train.optimizer's final_fraction"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the run's steps")
    sft_reduction: Literal["token", "prompt"] = "token"

    def routing(self, round: int) -> Routing:
        return Routing(sft=ALL)

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(sft_reduction=self.sft_reduction)

    def stage(self, round: int, rounds: int) -> Stage:
        return Stage(0, rounds, decay=self.decay, warmup=self.warmup)
