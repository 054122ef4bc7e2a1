"""Attention over a packed row (batch.py), as an attention function of transformers: models stay as they are.

    a prompt's slot looks at its prompt, up to itself
    a response's slot looks at its whole prompt and at its own response, up to itself
    sliding layers: and no further back than their window, counted in positions

One idea: the blocks say everything, so nothing of size S x S is ever made on a CPU: each block's prompt is one causal
attention, and each response one that reads its prompt's keys with its own. On CUDA the same rules are a FlexAttention mask.
Layers get the blocks through the model's keyword arguments, so that they are there when a checkpointed layer runs again.
Left out: models whose attention does more than this (soft caps, chunks, sinks): the probe in model.py finds them.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from trainer.batch import Block

NAME = "dypo_packed"
WHOLE_BLOCK = 256  # slots up to which a block is one dense attention: below it, calls cost more than what masks waste


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    blocks: Sequence[Block] = (),
    **more: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, S, D], key and value [1, key heads, S, D] -> [1, S, heads, D]. Signature: AttentionInterface.

    Raises ValueError if the model did not pass the blocks on, or asks for what is not done here.
    """
    if not blocks or attention_mask is not None or more.get("softcap") is not None or more.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} cannot run on packed rows")
    if query.is_cuda:
        out = flex(query, key, value, tuple(blocks), scaling, sliding_window)
    else:
        if key.shape[1] != query.shape[1]:
            each = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        pieces = [piece for block in blocks for piece in _block(query, key, value, block, scaling, sliding_window)]
        out = torch.cat(pieces, 2)
    return out.transpose(1, 2), None


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block, scaling: float | None, window: int | None) -> list[Tensor]:
    """The block's slots, in order: the prompt, then each response."""

    def attend(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)

    def slots(x: Tensor, start: int, length: int) -> Tensor:
        return x[:, :, start : start + length]

    start, prompt, size = block.start, block.prompt, block.stop - block.start
    whole = len(block.responses) == 1
    if whole or size <= WHOLE_BLOCK:
        mask = None if whole and not _hides(window, size) else _block_mask((prompt, *block.responses), window)
        return [attend(mask, *(slots(x, start, size) for x in (q, k, v)))]

    own = [slots(x, start, prompt).clone() for x in (q, k, v)]  # kept for backward: a slice would keep all of q, k and v
    out = [attend(_lower_right(prompt, prompt, window) if _hides(window, prompt) else None, *own)]
    at = start + prompt
    for length in block.responses:
        if length == 0:
            continue
        q_L, k_L, v_L = (torch.cat([p, slots(x, at, length)], 2) for p, x in zip(own, (q, k, v), strict=True))
        if length < prompt or _hides(window, prompt + length):
            mask = _lower_right(length, prompt + length, window)
            out.append(attend(mask, q_L[:, :, prompt:], k_L, v_L))
        else:  # plain causal attention needs no mask and skips what is hidden: cheaper, though the prompt's part is dropped
            out.append(attend(None, q_L, k_L, v_L)[:, :, prompt:])
        at += length
    return out


def _hides(window: int | None, length: int) -> bool:
    """Whether a sliding window hides anything in a sequence of this length."""
    return window is not None and length > window


def _lower_right(rows: int, columns: int, window: int | None) -> Tensor:
    """Causal, for the last `rows` of `columns` positions. True: may look."""
    behind = torch.arange(columns - rows, columns).unsqueeze(1) - torch.arange(columns)
    return (behind >= 0) & (behind < (window or columns))


@lru_cache(maxsize=512)
def _block_mask(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """The whole block at once, [slots, slots]."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) + (lengths[0] if i else 0) for i, n in enumerate(lengths)])
    behind = position.unsqueeze(1) - position
    seen = (segment.unsqueeze(1) == segment) | (segment == 0)
    return seen & (behind >= 0) & (behind < (window or sum(lengths)))


# ---------------------------------------------------------------- CUDA
def flex(q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scaling: float | None, window: int | None) -> Tensor:
    """The same by FlexAttention, [1, heads, S, D]. Compiled on CUDA; written without a GPU at hand (docs/gpu.md)."""
    run = _compiled() if q.is_cuda else flex_attention
    mask = _flex_mask(blocks, window, q.device)
    return cast(Tensor, run(q, k, v, block_mask=mask, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=4)
def _flex_mask(blocks: tuple[Block, ...], window: int | None, device: torch.device) -> BlockMask:
    """One mask for all layers of a kind: made once a micro-batch."""
    lengths = [(at, i, n) for at, b in enumerate(blocks) for i, n in enumerate((b.prompt, *b.responses))]
    sizes = torch.tensor([n for *_, n in lengths])
    block_S, segment_S = (torch.repeat_interleave(torch.tensor([x[i] for x in lengths]), sizes).to(device) for i in (0, 1))
    position_S = torch.cat([torch.arange(n) + (blocks[at].prompt if i else 0) for at, i, n in lengths]).to(device)

    def looks(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        behind = position_S[q] - position_S[k]
        seen = (segment_S[q] == segment_S[k]) | (segment_S[k] == 0)
        near = behind < (window if window is not None else len(position_S))
        return (block_S[q] == block_S[k]) & seen & (behind >= 0) & near

    return create_block_mask(looks, None, None, len(position_S), len(position_S), device=str(device))


AttentionInterface.register(NAME, packed_attention)
