"""PRISM (arXiv 2604.28123): SFT, then alignment with the teachers' text against a discriminator, then RL on verdicts.

    rounds before sft_rounds     L = SFT over all traces, mean over tokens (sft.py)
    the next align_rounds        L = (1 / B) sum_i (1 / T_i) sum_t -min(r A_i, clip(r, 0.8, 1.2) A_i),  A_i = (D(y_i) - mean) / (std + eps)
                                 D minimises -log sigmoid(D(y_teacher) - D(y_student))
    rounds from there on         the same L with A_i of the verifier's rewards R_i

Needs: traces and groups of rollouts; the SFT rounds draw none. Routing: all traces; then the whole groups of the prompts that have a
trace, whatever their grade; then the groups whose pass rate is from 0.2 to 0.8, by counts, ends included.
Advantage: std of the group, of D's scores (table `ratings`; a shard's `reward` is the score then) and later of the verdicts.
Published: 500 steps of alignment and 1500 of RL, KL 0. lr, clip and SFT settings are not in our notes: GRPO's and sft_then_rl's.

From secondary notes (ALGORITHMS section 9), and adapted. One discriminator of text (theirs has two heads, vision and reasoning), and a
small one: a logistic regression on token n-grams (pipeline/discriminator.py), so it knows vocabulary, phrasing and format, not whether
an argument holds. It is fitted anew in each alignment round on that round's stored traces and rollouts, and rates the prompts it has not seen (two
folds), where theirs is trained on along with the policy, step by step; so D's scores are rows, and training on them can be
replayed. Alignment and RL share one AdamW. The reward has no format term but what the verifier gives.
"""

from typing import Literal

from pydantic import Field, model_validator

from schemas.methods.after_sft import AfterSFT
from schemas.methods.base import ALL, Routing, Stage
from schemas.methods.terms import Discriminator


class PRISMMethod(AfterSFT):
    """SFT, adversarial alignment with the teachers' text, RL (docs/methods/prism.md)."""

    type: Literal["prism"]
    sft_rounds: int = Field(default=1, ge=0, description="rounds of SFT at first")
    align_rounds: int = Field(default=1, ge=1, description="rounds of alignment after them")
    min_pass_rate: float = Field(default=0.2, ge=0, le=1, description="of a prompt that RL takes")
    max_pass_rate: float = Field(default=0.8, ge=0, le=1, description="of a prompt that RL takes")
    discriminator: Discriminator = Discriminator()

    @model_validator(mode="after")
    def _a_range(self) -> "PRISMMethod":
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}, so RL would take no prompt; swap them"
            )
        return self

    def routing(self, round: int) -> Routing:
        if round < self.sft_rounds:
            return Routing(sft=ALL)
        if round < self.rounds_before_rl:
            return Routing(rl=ALL, discriminator=self.discriminator)
        return Routing(rl=ALL, pass_rate=(self.min_pass_rate, self.max_pass_rate))

    @property
    def rounds_before_rl(self) -> int:
        return self.sft_rounds + self.align_rounds

    def unused(self, round: int) -> frozenset[str]:
        routed = {"discriminator", "min_pass_rate", "max_pass_rate"}  # in the shards already
        later = {"align_rounds"} if round < self.sft_rounds else set()
        return super().unused(round) | routed | later

    def stage(self, round: int, rounds: int) -> Stage:
        aligned = self.rounds_before_rl
        return Stage(aligned, rounds - aligned) if round >= aligned else super().stage(round, aligned)
