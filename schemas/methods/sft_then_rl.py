"""SFT, then RL: two stages, the baseline that every mixed method has to beat (arXiv 2604.23747, the corrected recipe).

    rounds before sft_rounds    L = SFT over all traces, mean over tokens (sft.py); lr sft_lr, warm-up and cosine over these rounds
    rounds from there on        L = (1 / N) sum_i sum_t -min(r A_i, clip(r, 0.8, 1.28) A_i),  A_i = R_i - mean;  lr constant

Needs: traces, then groups of rollouts; the SFT rounds draw none. Each stage has an optimizer of its own, as two runs would.
Routing: all traces, then every whole group. Advantage: centred, not divided by the std.
Published: SFT 5e-5 cosine to 0.1, 10 % warm-up, batch 64; RL 1e-6 constant, clip 0.2 and 0.28, token-mean, no KL.
"""

from typing import Literal

from schemas.methods.after_sft import AfterSFT
from schemas.methods.base import ALL, Routing


class SFTThenRLMethod(AfterSFT):
    """Supervised first, on-policy afterwards (docs/methods/sft_then_rl.md)."""

    PUBLISHED = {"grpo": {"clip_high": 0.28, "advantage": "none", "aggregation": "token-mean"}}

    type: Literal["sft_then_rl"]

    def routing(self, round: int) -> Routing:
        return Routing(sft=ALL) if round < self.sft_rounds else Routing(rl=ALL)
