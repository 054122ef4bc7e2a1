"""SFT, then RL: two stages, the baseline that every mixed method has to beat (arXiv 2604.23747, the corrected recipe).

    rounds before sft_rounds    L = SFT over all traces, mean over tokens (sft.py); lr sft_lr, warm-up and cosine over these rounds
    rounds from there on        L = (1 / N) sum_i sum_t -min(r A_i, clip(r, 0.8, 1.28) A_i),  A_i = R_i - mean;  lr constant

Needs: traces, then groups of rollouts; the SFT rounds draw none. Each stage has an optimizer of its own, as two runs would.
Routing: all traces, then every whole group. Advantage: centred, not divided by the std.
Published: SFT 5e-5 cosine to 0.1, 10 % warm-up, batch 64; RL 1e-6 constant, clip 0.2 and 0.28, token-mean, no KL.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Routing, Stage, Weights
from schemas.methods.terms import GRPO


class SFTThenRLMethod(Method):
    """Supervised first, on-policy afterwards (docs/methods/sft_then_rl.md)."""

    PUBLISHED = {"grpo": {"clip_high": 0.28, "advantage": "none", "aggregation": "token-mean"}}

    type: Literal["sft_then_rl"]
    sft_rounds: int = Field(default=1, ge=1, description="rounds of SFT before the first with rollouts")
    sft_lr: float = Field(default=5e-5, gt=0)
    sft_decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="over the SFT rounds; train.optimizer's is the RL rounds'"
    )
    sft_warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the SFT steps")
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(sft=ALL) if round < self.sft_rounds else Routing(rl=ALL)

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0, grpo=1.0)  # a round has rows of one kind only

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)

    @property
    def rates(self) -> dict[str, float]:
        return {"main": self.lr, "sft": self.sft_lr}

    def stage(self, round: int, rounds: int) -> Stage:
        if round < self.sft_rounds:
            return Stage(0, self.sft_rounds, "sft", self.sft_decay, self.sft_warmup)
        return Stage(self.sft_rounds, rounds - self.sft_rounds)

    def unused(self, round: int) -> frozenset[str]:
        other = {"lr", "grpo"} if round < self.sft_rounds else {"sft_lr", "sft_decay", "sft_warmup"}
        return super().unused(round) | other
