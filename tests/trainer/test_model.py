"""Packed rows against one sequence at a time with the model's own attention and full logits, for families of models."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from schemas.errors import UserError
from schemas.recipe import Policy
from tests.trainer.by_hand import gradient
from tests.trainer.families import NOT_PACKED, PACKED, VOCAB, tiny
from trainer import attention
from trainer.attention import flex
from trainer.batch import Block, pack
from trainer.model import PolicyLM, load_model, packed_if_possible, recompute_activations


def rows_of(groups: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[Any]:
    """(prompt length, response lengths) of each group -> rows of random ids."""
    from types import SimpleNamespace

    import numpy as np

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, p) for p, _ in groups]
    return [
        SimpleNamespace(prompt_tokens=prompt, tokens=rng.integers(3, VOCAB, n), temperature=0.7 + 0.1 * at)
        for at, (prompt, (_, lengths)) in enumerate(zip(prompts, groups, strict=True))
        for n in lengths
    ]


ROWS = rows_of([(9, [12, 1, 3, 7]), (4, [11]), (2, [5, 5]), (13, [2, 2, 2])])


def alone(lm: nn.Module, row: Any) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of one response: one sequence, the model's own forward, full logits."""
    ids = torch.tensor([[*row.prompt_tokens.tolist(), *row.tokens.tolist()]])
    logps = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits[0].double() / row.temperature, -1)
    at = len(row.prompt_tokens) - 1
    logps = logps[at : at + len(row.tokens)]
    return logps.gather(1, torch.from_numpy(row.tokens).unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(-1)


def check(model: PolicyLM, lm: nn.Module, rows: Sequence[Any]) -> None:
    """Log-probs, entropies and the gradient of a weighted sum agree with one sequence at a time."""
    batch = pack(rows, share=model.packed)
    logps_BT, entropy_BT = model(batch)
    weights_BT = torch.arange(1.0, logps_BT.numel() + 1).view_as(logps_BT).sin()
    model.zero_grad()
    (logps_BT * weights_BT).sum().backward()
    got = gradient(model)
    lm.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for at, row in enumerate(rows):
        want_T, entropy_T = alone(lm, row)
        n = len(row.tokens)
        torch.testing.assert_close(logps_BT[at, :n].double(), want_T, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy_BT[at, :n].double(), entropy_T, atol=1e-5, rtol=0)
        assert logps_BT[at, n:].abs().sum() == 0
        total = total + (want_T * weights_BT[at, :n]).sum()
    total.backward()
    want = gradient(lm)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("whole_block", [0, 1000], ids=["response by response", "block by block"])
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_row_gives_the_log_probs_and_the_gradient_of_one_sequence_at_a_time(
    name: str, whole_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WHOLE_BLOCK", whole_block)
    model = packed_if_possible(tiny(name, PACKED[name]))
    assert model.packed, model.why_not
    check(model, tiny(name, PACKED[name]), ROWS)


@given(
    st.lists(st.tuples(st.integers(1, 14), st.lists(st.integers(1, 14), min_size=1, max_size=5)), min_size=1, max_size=4),
    st.sampled_from(["llama", "gemma3_text"]),
    st.sampled_from([0, 20, 1000]),
)
@settings(deadline=None, max_examples=25)
def test_packing_is_exact_whatever_the_lengths(groups: list[tuple[int, list[int]]], name: str, whole_block: int) -> None:
    before = attention.WHOLE_BLOCK
    attention.WHOLE_BLOCK = whole_block
    try:
        check(packed_if_possible(tiny(name, PACKED[name])), tiny(name, PACKED[name]), rows_of(groups, seed=1))
    finally:
        attention.WHOLE_BLOCK = before


@pytest.mark.parametrize("name", NOT_PACKED)
def test_a_model_that_cannot_be_packed_runs_one_sequence_a_row_and_is_still_right(name: str) -> None:
    model = packed_if_possible(tiny(name, NOT_PACKED[name]))
    assert not model.packed
    assert model.why_not
    check(model, tiny(name, NOT_PACKED[name]), ROWS)


def test_the_probe_finds_a_model_that_ignores_its_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for all layers is silently wrong by 0.1 and more; so is any model that does more than we know of."""
    right = attention.packed_attention

    def one_mask(*args: Any, **more: Any) -> Any:
        return right(*args, **{**more, "sliding_window": None})

    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, one_mask)
    try:
        model = packed_if_possible(tiny("gemma3_text", PACKED["gemma3_text"]))
    finally:
        AttentionInterface.register(attention.NAME, right)
    assert not model.packed
    assert "differ by" in str(model.why_not)


def test_loading_a_model_that_cannot_be_packed_says_so(tmp_path: Path) -> None:
    tiny("granite", NOT_PACKED["granite"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="rows are not packed.*differ by"):
        load_model(tmp_path, Policy(model=tmp_path, device="cpu"))
    tiny("llama", {}).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(tmp_path, Policy(model=tmp_path, device="cpu")).packed


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "granite"])
def test_recomputing_activations_changes_nothing_but_what_is_kept(name: str) -> None:
    settings = (PACKED | NOT_PACKED)[name]
    model = packed_if_possible(tiny(name, settings))
    recompute_activations(model.lm)
    calls: list[int] = []
    model.lm.get_submodule("model.layers.0.input_layernorm").register_forward_hook(lambda *_: calls.append(1))
    check(model, tiny(name, settings), ROWS)
    assert len(calls) == 2, "the layer runs again in the backward pass"


def test_gradients_do_not_reach_siblings_prompts_of_others_or_the_future() -> None:
    """With inputs instead of weights: the exact set of slots that a response's log-probs depend on."""
    model = packed_if_possible(tiny("llama", {}))
    taken: list[Tensor] = []
    model.lm.get_input_embeddings().register_forward_hook(lambda m, i, out: (out.retain_grad(), taken.append(out))[0])  # type: ignore[operator]
    logps_BT, _ = model(pack(ROWS))
    logps_BT[2, 1].backward()  # the third response (3 tokens) to the first prompt: its second token
    seen = taken[0].grad[0].abs().sum(-1).nonzero().flatten().tolist()  # type: ignore[index]
    assert seen == [*range(9), 9 + 11 + 0]  # the prompt's 9 slots; siblings have 11 and 0 slots before it; its first token


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_flex_attention_mask_says_the_same_as_the_blocks(window: int | None, key_heads: int) -> None:
    """FlexAttention is what CUDA runs; on a CPU it has a forward, uncompiled."""
    batch = pack(ROWS)
    torch.manual_seed(0)
    size = len(batch.input_ids_S)
    q, k, v = (torch.randn(1, heads, size, 8) for heads in (4, key_heads, key_heads))
    want, _ = attention.packed_attention(nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, blocks=batch.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        got = flex(q, k, v, batch.blocks, 0.3, window)
    torch.testing.assert_close(got.transpose(1, 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_longest_neighbour_are_refused(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    tiny("llama", {"rope_parameters": rope}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"rope_type {kind}"):
        load_model(tmp_path, Policy(model=tmp_path, device="cpu"))


def test_attention_keeps_no_more_for_backward_than_each_response_with_its_prompt() -> None:
    """A slice that is kept keeps all that it was sliced from: a tenth of a small model's activations, once."""
    lengths = (63, 62, 60, 63, 63, 61, 63, 63)
    block = Block(0, 32, lengths)
    assert block.stop > attention.WHOLE_BLOCK
    q, k, v = (torch.randn(1, 4, block.stop, 16, requires_grad=True) * 1.0 for _ in range(3))
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, blocks=[block])
    assert out.shape == (1, block.stop, 4, 16)
    slots = sum(32 + n for n in lengths) + 32
    each = 4 * 16 * 4  # bytes of a slot of q
    assert sum(kept.values()) < 4.1 * slots * each  # q, k, v and the result; a little for the softmax's sums
