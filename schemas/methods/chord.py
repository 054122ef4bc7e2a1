"""CHORD (arXiv 2508.11408): SFT as a term of the RL objective whose weight mu decays, or whose tokens are weighed.

    L = (1 - mu) GRPO + mu SFT        each term the mean over its own tokens
    mu   variant: -log p, mu linear from mu_peak to mu_valley over decay_steps after warmup_steps
    phi  variant: -sg(p (1 - p)) log p (at most 1/4, at p = 1/2), mu constant at mu_peak

Needs: groups of rollouts, traces. Routing: every whole group and every trace of the same prompts (an adaptation: the authors have
expert rows of other prompts). Advantage: std of the group. Published: mu 0.9 to 0.05 over 30 steps; phi: mu 0.1; clip 0.2,
lr 1e-6 to 1e-5, token-mean.
"""

from typing import Any, Literal

from pydantic import Field

from schemas.methods.base import ALL, Loss, Method, Routing, Weights
from schemas.methods.terms import GRPO


class CHORDMethod(Method):
    """GRPO with a dynamically weighted SFT term (docs/methods/chord.md)."""

    type: Literal["chord"]
    variant: Literal["mu", "phi"] = "mu"
    mu_peak: float = Field(default=0.9, ge=0, le=1, description="SFT's weight at first; variant phi: 0.1, always")
    mu_valley: float = Field(default=0.05, ge=0, le=1, description="SFT's weight at last")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which mu rises from mu_valley to mu_peak")
    decay_steps: int = Field(default=30, ge=1, description="steps in which mu falls from mu_peak to mu_valley")
    grpo: GRPO = GRPO()

    @classmethod
    def published(cls, values: dict[str, Any]) -> dict[str, Any]:
        grpo = {"grpo": {"aggregation": "token-mean"}}
        if values.get("variant") != "phi":
            return grpo
        peak = values.get("mu_peak", 0.1)
        return {**grpo, "mu_peak": peak, "mu_valley": peak}

    def mu(self, step: int) -> float:
        """SFT's weight at a step of the run."""
        if step < self.warmup_steps:
            return self.mu_valley + (self.mu_peak - self.mu_valley) * step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        return self.mu_peak + (self.mu_valley - self.mu_peak) * done

    def routing(self, round: int) -> Routing:
        return Routing(rl=ALL, sft=ALL)

    def weights(self, step: int) -> Weights:
        mu = self.mu(step)
        return Weights(sft=mu, grpo=1 - mu)

    @property
    def loss(self) -> Loss:
        return Loss(self.grpo, trace_weight="phi" if self.variant == "phi" else "plain", normalise="own")
