"""Gated MLPs that make their products again: the same numbers, and less kept."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.families import PACKED, SIZES, tiny
from trainer.gated_mlp import PARTS, spare_products


def step(model: Any, ids: torch.Tensor, width: int) -> tuple[int, torch.Tensor, list[torch.Tensor]]:
    """Tensors as wide as the MLP that autograd keeps; the loss; the gradients."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.shape[-1:] == (width,) and t.dim() == 3:
            kept[t.untyped_storage().data_ptr()] = 1
        return t

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    return len(kept), loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen2", "qwen3", "gemma", "gemma3_text", "mistral", "olmo2"])
def test_loss_and_gradients_are_bitwise_the_same_and_only_gate_and_up_are_kept(family: str) -> None:
    model: Any = tiny(family, PACKED[family])
    mlps = [m for m in model.modules() if all(hasattr(m, part) for part in PARTS)]
    assert len(mlps) == 3
    ids = torch.arange(24).reshape(1, 24)
    before, loss, gradients = step(model, ids, SIZES["intermediate_size"])
    assert before >= 3 * 3, "gate, up, and their products"
    spare_products(model)
    assert all("forward" in vars(m) for m in mlps)
    after, again, also = step(model, ids, SIZES["intermediate_size"])
    assert after == 2 * 3, "gate and up alone"
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, also, strict=True))


class Scaled(nn.Module):
    """Names its parts as the others do, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_an_mlp_that_only_looks_alike_is_left_alone() -> None:
    model = nn.Sequential(Scaled())
    x = torch.ones(2, 4)
    want = model(x)
    spare_products(model)
    assert torch.equal(model(x), want)
    assert "forward" not in vars(model[0])
