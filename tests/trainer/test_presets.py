"""Presets do what ALGORITHMS section 7.5 says."""

from schemas.recipe import DypoMethod
from trainer.objective import Counts, mixture

COUNTS = Counts(prompts=8, hard=2, mid=6, rows=50, sft_tokens=100, rl_tokens=900, pairs=60)


def test_default_is_the_convex_mixture_with_means_against_the_base_policy() -> None:
    method = DypoMethod()
    assert (method.gal.logp_reduction, method.gal.ref, method.gal.beta, method.alpha, method.gamma) == (
        "mean",
        "init",
        1.0,
        0.5,
        1.0,
    )
    assert (method.grpo.ratio, method.grpo.clip_low, method.grpo.clip_high, method.grpo.advantage) == (
        "token",
        0.2,
        0.2,
        "std",
    )
    assert (method.lr, method.schedule, method.sft_reduction, method.normalise) == (1e-6, "joint", "token", "gated")
    mixed = mixture(method.weights(0), method.loss, COUNTS)
    assert (mixed.sft, mixed.grpo, mixed.gal) == (0.25, 0.375, 0.375)
    assert method.loss.needs_reference


def test_paper_sums_log_probs_and_shares_one_normaliser() -> None:
    method = DypoMethod.model_validate({"preset": "paper"})
    assert (method.gal.logp_reduction, method.gal.ref, method.gal.beta, method.alpha) == ("sum", "init", 1.0, 0.5)
    assert (method.sft_reduction, method.lr, method.schedule) == ("prompt", 1e-6, "joint")
    assert method.loss.needs_reference


def test_official_is_gspo_plus_a_thousandth_of_reference_free_gal_with_two_optimizers() -> None:
    method = DypoMethod.model_validate({"preset": "official"})
    assert (method.grpo.ratio, method.gal.logp_reduction, method.gal.ref, method.gal.beta) == (
        "sequence",
        "sum",
        "none",
        0.1,
    )
    assert (method.schedule, method.lr, method.sft_lr) == ("queue", 5e-7, 5e-6)
    rl_only = Counts(prompts=6, hard=0, mid=6, rows=48, sft_tokens=0, rl_tokens=900, pairs=60)
    mixed = mixture(method.weights(0), method.loss, rl_only)
    assert (mixed.sft, mixed.grpo, mixed.gal) == (0.0, 1.0, 0.001)
    assert not method.loss.needs_reference


def test_without_gal_no_reference_is_asked_for() -> None:
    method = DypoMethod(alpha=1.0)
    assert method.weights(0).gal == 0
    assert not method.loss.needs_reference


def test_stored_log_probs_are_asked_for_by_the_options_that_read_them() -> None:
    reference_free = {"gal": {"ref": "none"}}
    for method, roles in (
        ({}, ("ref",)),
        (reference_free, ()),
        (reference_free | {"grpo": {"kl": 0.1}}, ("ref",)),
        (reference_free | {"grpo": {"old": "trainer"}}, ("old",)),
        ({"alpha": 1.0, "grpo": {"old": "trainer", "kl": 0.1}}, ("old", "ref")),
    ):
        assert DypoMethod.model_validate(method).loss.logprob_roles == roles
