"""HPT, Hybrid Post-Training (arXiv 2509.04419): each prompt is supervised if at most gamma of its rollouts are right, else RL.

    L = mean over prompts of (SFT if successes <= gamma else PG)        PG: -r A_i, not clipped, summed over tokens / horizon

Needs: groups of rollouts, traces of Hard prompts. Gamma is `grade.hard_max_successes`, a count: 0 for Qwen, 2 of 8 for Llama.
Routing: successes <= gamma to SFT, all others to RL, in one joint update. Advantage: centred, not divided by the std (code).
Published: sft_weight 1 (0.3 for Qwen2.5-Math-1.5B), horizon 8192, lr 5e-6 constant. Left out: the entropy bonus of 0.001, and
skipping steps whose gradient norm is over 80.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import Loss, Method, Routing, Weights
from schemas.methods.terms import GRPO, UNCLIPPED_SUM


class HPTMethod(Method):
    """A switch by success count, both kinds in one update (docs/methods/hpt.md)."""

    PUBLISHED = UNCLIPPED_SUM

    type: Literal["hpt"]
    lr: float = Field(default=5e-6, gt=0)
    sft_weight: float = Field(default=1.0, ge=0)
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=("easy", "mid"), sft=("hard",))

    def weights(self, step: int) -> Weights:
        return Weights(sft=self.sft_weight, grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)
