"""SRFT (arXiv 2506.19767, section 4): SFT and RL on traces and rollouts in one stage, weighed by the policy's entropy H.

    traces, supervised     -0.5 sg(exp(-H)) log p
    traces, off-policy     -p A                          the behaviour's probability taken as 1, not clipped
    rollouts               -0.1 sg(exp(H)) log p  if right,   +log p  if wrong

H: mean entropy of the row's tokens, detached. Needs: groups of rollouts, a trace of each prompt. Routing: every whole group and,
beside it, its trace. Advantage: of the trace, over the union of rollouts and trace, divided by the std.
Published: k 8, lr 1e-6 after an SFT stage at 5e-6. Every row's sum over tokens is divided by its length here (the paper has plain
sums), so that long traces do not drown the rollouts. The authors' code seems to have exp(+H) in the first weight; this is the paper's.
+log p of wrong rollouts is unbounded below: leave the gradient clipped (train.optimizer.clip_norm).
"""

from typing import Literal

from schemas.methods.base import ALL, Loss, Method, Routing, Weights


class SRFTMethod(Method):
    """Single-stage SFT and RL with entropy-aware weights (docs/methods/srft.md)."""

    type: Literal["srft"]

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, sft=ALL, union=True)

    def weights(self, step: int) -> Weights:
        return Weights(sft=1.0, grpo=1.0)

    @property
    def loss(self) -> Loss:
        return Loss(
            trace_weight="entropy",
            rollout_term="self",
            off_policy="ratio",
            sft_reduction="prompt",
            normalise="own",
        )
