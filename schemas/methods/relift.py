"""ReLIFT (arXiv 2506.07527): RL on every prompt; the Hard ones' traces wait in a buffer, and a full buffer is one SFT update.

    each step    L = PG: -r A_i, not clipped, summed over tokens / horizon
    and when sft_rows traces wait: one update of its own optimizer on L = SFT, mean over tokens

Needs: groups of rollouts, traces of Hard prompts. Routing: every whole group to RL, Hard prompts to SFT as well.
Advantage: centred, not divided by the std. Published: 128 traces, both lr 1e-6, horizon 8192. Differences from the authors'
code, all on purpose: the buffer is first in, first out (theirs lets old rows starve); its SFT gradient has its full scale
(theirs is divided by 32 where 4 micro-batches run); the SFT update is made before the step's RL update, not after it; what waits at
the end of a round is an update of its last step, since rows belong to their round; no entropy bonus.
"""

from typing import Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Queues, Routing, Weights
from schemas.methods.terms import GRPO, UNCLIPPED_SUM


class ReLIFTMethod(Method):
    """RL on all prompts, interleaved with SFT on the hardest (docs/methods/relift.md)."""

    PUBLISHED = UNCLIPPED_SUM

    type: Literal["relift"]
    sft_lr: float = Field(default=1e-6, gt=0, description="of the second optimizer")
    sft_rows: int = Field(default=128, ge=1, description="traces in one SFT update")
    grpo: GRPO = GRPO()

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, sft=("hard",))

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0, grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(grpo=self.grpo)

    @property
    def queues(self) -> Queues:
        return Queues(sft=self.sft_rows, groups=1, flush=True)

    @property
    def rates(self) -> dict[str, float]:
        return {"main": self.lr, "sft": self.sft_lr}
