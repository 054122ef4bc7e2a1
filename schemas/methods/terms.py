"""What methods are made of, as recipe tables: the policy gradient, the Group Alignment Loss, a discriminator."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.model import Model


class GAL(Model):
    """Group Alignment Loss (paper Eq. 14-15, 23; ALGORITHMS 7.3 rows 1 and 2)."""

    logp_reduction: Literal["mean", "sum"] = "mean"
    ref: Literal["init", "none", "old"] = "init"
    beta: float = Field(default=1.0, gt=0)
    form: Literal["pairs", "flat"] = Field(
        default="pairs",
        description="flat: each pair weighs the same, whatever its d; a constant weight a group (method grpo_flat)",
    )
    pairs: Literal["correct", "reward"] = Field(
        default="correct",
        description="reward: of graded rewards (a judge's), every pair with R(s) > R(f) within a Mid group",
    )


class GRPO(Model):
    """The policy-gradient term and its off-policy care (docs/losses.md has each formula)."""

    ratio: Literal["token", "sequence"] = Field(default="token", description="sequence: GSPO, one ratio a row")
    surrogate: Literal["clip", "cispo", "unclipped"] = Field(
        default="clip",
        description="cispo: the clipped ratio is a constant weight, TRL's has clip_low 1 and clip_high 4; unclipped: ratio times advantage",
    )
    clip_low: float = Field(default=0.2, gt=0, le=1, description="ratios below 1 - clip_low are clipped; 1: none are")
    clip_high: float = Field(default=0.2, gt=0, description="ratios above 1 + clip_high are clipped")
    dual_clip: float | None = Field(
        default=None, gt=1, description="where the advantage is negative, no gradient from ratios above this; verl: 3"
    )
    old: Literal["sampler", "trainer"] = Field(
        default="sampler",
        description="whose log-probs of the sampling policy the ratio divides by; trainer: rows of role old",
    )
    truncation: Literal["none", "token", "sequence"] = Field(
        default="none", description="old = trainer: weigh by min(exp(trainer - sampler), cap), of a token or of a whole row"
    )
    truncation_cap: float = Field(default=2.0, gt=0, description="the cap of truncation")
    kl: float = Field(default=0.0, ge=0, description="weight of the KL (k3) to the base policy, a part of this term")
    mask_truncated: bool = Field(
        default=False, description="rollouts cut at max_tokens: no gradient, in GRPO, KL and GAL; they count in denominators"
    )
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"] = Field(
        default="seq-mean-token-mean", description="token-mean: over all Mid tokens of the update (DAPO); the last: Dr.GRPO"
    )
    horizon: int | None = Field(
        default=None,
        ge=1,
        description="seq-mean-token-sum-norm only: the constant number of tokens that a row is divided by",
    )
    advantage: Literal["std", "none"] = Field(default="std", description="none: centred, not divided by the std")
    eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _options_agree(self) -> "GRPO":
        if self.surrogate != "clip" and self.ratio == "sequence":
            raise ValueError(f"surrogate = '{self.surrogate}' weighs each token by its own ratio; use ratio = 'token'")
        if self.surrogate == "cispo" and self.dual_clip is not None:
            raise ValueError("dual_clip bounds the clipped surrogate; surrogate = 'cispo' has its bound in clip_high")
        if self.surrogate == "unclipped" and (self.dual_clip is not None or (self.clip_low, self.clip_high) != (0.2, 0.2)):
            raise ValueError("clip_low, clip_high and dual_clip bound a clipped ratio; surrogate = 'unclipped' has no bound")
        if self.truncation == "token" and self.ratio == "sequence":
            raise ValueError("ratio = 'sequence' has one ratio a row and takes one weight a row: truncation = 'sequence'")
        if self.truncation != "none" and self.old == "sampler":
            raise ValueError(
                f"truncation = '{self.truncation}' weighs by the trainer's log-probs against the sampler's, so it needs "
                "old = 'trainer'; with old = 'sampler' the ratio itself is against the sampler"
            )
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.horizon is not None):
            raise ValueError("horizon belongs to aggregation = 'seq-mean-token-sum-norm' and is needed there")
        return self


class Discriminator(Model):
    """A linear score of a response's token n-grams: teachers' text against the policy's (pipeline/discriminator.py has the formula)."""

    ngram: int = Field(default=2, ge=1, description="the longest n-gram, in tokens")
    bits: int = Field(default=14, ge=4, le=24, description="n-grams are hashed into 2^bits places")
    steps: int = Field(default=200, ge=1, description="of gradient descent, over all pairs")
    l2: float = Field(default=1e-4, ge=0, lt=1, description="weight of |w|^2 / 2")
    prompts: int = Field(default=512, ge=1, description="of a fold: so many are learned from, at most")


# The policy gradient of LUFFY's code, which HPT and ReLIFT are forks of: centred, not clipped, summed over a constant horizon
UNCLIPPED_SUM = {
    "grpo": {"surrogate": "unclipped", "advantage": "none", "aggregation": "seq-mean-token-sum-norm", "horizon": 8192}
}
