"""DYPO, Dynamic Policy Optimization (arXiv 2604.08926, Eq. 4), as ALGORITHMS section 7 resolves it.

    L = (n_hard / n) gamma SFT + (n_mid / n) (alpha GRPO + (1 - alpha) GAL)

Needs: groups of rollouts, traces of Hard prompts by two teachers or more. Routing: Mid groups to RL, Hard prompts to SFT, Easy ones
dropped. Advantage: std of the group. Presets: default; paper (log-probs summed); official (the authors' code).
Ablations: alpha = 1 (no GAL), supervise = [] (no SFT), supervise = ["hard", "easy"] (Easy kept), all three grades (no routing),
one [[teachers]] in the recipe.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from schemas.methods.base import Grade, Loss, Method, Queues, Routing, Weights
from schemas.methods.terms import GAL, GRPO

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"gal": {"logp_reduction": "sum"}, "sft_reduction": "prompt"},
    "official": {
        "gal": {"logp_reduction": "sum", "ref": "none", "beta": 0.1},
        "grpo": {"ratio": "sequence"},
        "gal_weight": 0.001,
        "schedule": "queue",
        "lr": 5e-7,
        "sft_lr": 5e-6,
    },
}


class DypoMethod(Method):
    """DYPO (arXiv 2604.08926, Eq. 4) as ALGORITHMS section 7 resolves it; a preset fills what is not given."""

    type: Literal["dypo"] = "dypo"
    preset: Literal["default", "paper", "official"] = "default"
    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of GRPO; 1 - alpha is GAL's")
    gal_weight: float | None = Field(
        default=None, ge=0, description="if set: GRPO + gal_weight * GAL, and alpha is not used"
    )
    gamma: float = Field(default=1.0, ge=0, description="weight of SFT")
    gal: GAL = GAL()
    grpo: GRPO = GRPO()
    sft_reduction: Literal["token", "prompt"] = "token"
    normalise: Literal["gated", "all"] = Field(default="gated", description="all: Easy prompts count in n too")
    schedule: Literal["joint", "queue"] = "joint"
    queue_size: int = Field(default=16, ge=1, description="queue only: Hard prompts in one SFT update")
    queue_groups: int = Field(default=8, ge=1, description="queue only: Mid groups in one RL update, at least")
    sft_lr: float | None = Field(default=None, gt=0, description="queue only: the second optimizer's learning rate")
    supervise: tuple[Grade, ...] = Field(default=("hard",), description="grades whose traces are supervised")

    @classmethod
    def published(cls, values: dict[str, Any]) -> dict[str, Any]:
        preset = dict(PRESETS.get(values.get("preset", "default"), {}))
        if values.get("schedule") == "joint":
            preset.pop("sft_lr", None)  # TOML cannot say "none", so what the user gives instead does
        if "alpha" in values and "gal_weight" not in values:
            preset.pop("gal_weight", None)
        return preset

    def routing(self, round: int) -> Routing:
        return Routing(rl=("mid",), sft=self.supervise)

    def weights(self, step: int) -> Weights:
        if self.gal_weight is not None:
            return Weights(self.gamma, 1.0, self.gal_weight)
        return Weights(self.gamma, self.alpha, 1 - self.alpha)

    @property
    def loss(self) -> Loss:
        gal = self.gal if self.weights(0).gal > 0 else None
        return Loss(self.grpo, gal, sft_reduction=self.sft_reduction, normalise=self.normalise)

    @property
    def queues(self) -> Queues | None:
        return Queues(self.queue_size, self.queue_groups) if self.schedule == "queue" else None

    @property
    def rates(self) -> dict[str, float]:
        return {"main": self.lr} if self.sft_lr is None else {"main": self.lr, "sft": self.sft_lr}

    @model_validator(mode="after")
    def _kl_has_a_weight(self) -> "DypoMethod":
        if self.grpo.kl > 0 and self.weights(0).grpo == 0:
            raise ValueError("grpo.kl is a part of the GRPO term, whose weight alpha is 0: set kl = 0, or alpha above 0")
        return self

    @model_validator(mode="after")
    def _queue_has_its_rate(self) -> "DypoMethod":
        if (self.schedule == "queue") != (self.sft_lr is not None):
            raise ValueError("sft_lr belongs to schedule = 'queue' (two optimizers) and is needed there; joint has one lr")
        return self
