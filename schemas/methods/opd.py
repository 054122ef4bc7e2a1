"""On-policy distillation: each token of a rollout is rewarded by how much likelier the teacher finds it (arXiv 2603.26666).

    L = (1 / N) sum_i sum_t -min(r A_t, clip(r) A_t)        A_t = sg(log p_teacher - log p_sampler),  r = exp(l_t - old_t)

Needs: rollouts, and a teacher with the policy's own tokenizer on disk, whose log-probs of every rollout are stored as rows of
role teacher; no traces. The verdicts grade and evaluate; the loss reads none. Routing: every whole group. Advantage: of each token, frozen when it was sampled.
Published: lr 5e-6, token-mean. From secondary notes (ALGORITHMS section 9).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from schemas.methods.base import GroupMethod, Loss


class OPDMethod(GroupMethod):
    """On-policy distillation from a teacher's log-probs (docs/methods/opd.md)."""

    PUBLISHED = {"grpo": {"aggregation": "token-mean"}}

    type: Literal["opd"]
    teacher: Path = Field(description="a Hugging Face folder with the policy's tokenizer")
    lr: float = Field(default=5e-6, gt=0)

    @model_validator(mode="after")
    def _by_token(self) -> "OPDMethod":
        if self.grpo.ratio == "sequence":
            raise ValueError("each token has an advantage of its own: use grpo.ratio = 'token'")
        return self

    @property
    def loss(self) -> Loss:
        return Loss(self.grpo, rollout_term="distill")
