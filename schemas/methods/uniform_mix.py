"""Uniform mix: RL and SFT on every prompt, without any routing; LUFFY's baseline "RL with SFT loss" (arXiv 2504.14945).

    L = PG + sft_weight * SFT        PG: -r A_i without clipping, summed over tokens / horizon;  SFT: mean over tokens

Needs: groups of rollouts, and a trace of each prompt (a prompt without one has its RL term alone). Each term is the mean over
its own rows. Routing: every whole group and every trace. Advantage: centred on the rollouts alone. Published: sft_weight 1, lr 1e-6.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Routing, Weights
from schemas.methods.terms import GRPO, UNCLIPPED_SUM


class UniformMixMethod(Method):
    """A policy gradient and a supervised loss on every prompt (docs/methods/uniform_mix.md)."""

    PUBLISHED = UNCLIPPED_SUM

    type: Literal["uniform_mix"]
    sft_weight: float = Field(default=1.0, ge=0)
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, sft=ALL)

    def weights(self, step: int) -> Weights:
        return Weights(sft=self.sft_weight, grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo, normalise="own")
