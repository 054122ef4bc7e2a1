"""Log-probs of given tokens from last hidden states, without ever holding the logits of all of them.

    z_u = (W h_u + b) / T_u        logp_n = z[u(n), target_n] - logsumexp(z[u(n)])        entropy_n = logsumexp(z) - sum softmax(z) z

One idea: logits exist only as a tile, some positions by some words of the vocabulary. Going over the vocabulary's tiles, the
forward carries a running maximum, sum of exponentials and their weighted sum (online softmax, arXiv 1805.02867); the backward
makes each tile again and turns it in place into d loss / d z = g at the target minus (sum of g) * softmax. The vocabulary is
the outer loop, so a tile of the weight's gradient is finished before the next is begun. Logits that fit in one tile are kept
(their exponentials are) rather than made twice: there recomputing would cost time and save nothing.

No outside kernel is used, on CPU or CUDA. torch 2.13's `linear_cross_entropy` (chunked, reduction "none") and Apple's
cut-cross-entropy give no entropy, so they would need the logits a second time; Liger's LigerFusedLinearScaledCrossEntropy
gives both, but has a fused kernel only for bfloat16 on some GPUs and is elsewhere chunked torch code such as this. None has a
temperature per position together with a bias. So the code below runs on CUDA too; it was measured on a CPU only.
Left out: double backward, the gradient of the entropy and of the temperature, a vocabulary split over processes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 32 << 20  # of logits in float32 (float64: twice); `python -m tests.bench.vocabulary tiles` tries others
TILE_POSITIONS = 2048


def token_logps(
    hidden_UH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    position_N: Tensor,
    target_N: Tensor,
    temperature_U: Tensor,
    *,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(logps_N, entropy_N) in nats over the whole vocabulary; differentiable in hidden, weight and bias through logps_N only.

    hidden_UH: last hidden states. weight_VH, bias_V: the output head; one that needs no gradient gets none, not even memory.
    position_N: the row of hidden_UH that predicts token n, in any order, rows repeated or left out. target_N: token ids.
    temperature_U divides the logits. tile: (positions, words) computed at once; None chooses.
    float32, or float64 for float64 inputs. Under autocast, or for bfloat16 inputs, the products are bfloat16 and all else
    is float32. ValueError if a position or a target does not exist. Needs a few tiles and two [U, H] beside the gradients.
    """
    if len(position_N) > 0:
        _check("position_N", position_N, len(hidden_UH))
        _check("target_N", target_N, len(weight_VH))
    if tile is None:
        positions = min(len(hidden_UH), TILE_POSITIONS)
        tile = positions, TILE_BYTES // (4 * max(positions, 1))
    tile = max(1, min(tile[0], len(hidden_UH))), max(1, min(tile[1], len(weight_VH)))
    return _TokenLogps.apply(hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U, tile)


def _check(name: str, index_N: Tensor, size: int) -> None:
    low, high = torch.stack(index_N.aminmax()).tolist()
    if low < 0 or high >= size:
        raise ValueError(f"{name}: values from {low} to {high}, expected 0 to {size - 1}")


class _Tiles:
    """The logits of [U, V], a tile at a time, and which tokens look at which rows of a tile."""

    def __init__(
        self,
        hidden_UH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        position_N: Tensor,
        target_N: Tensor,
        temperature_U: Tensor,
        tile: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype  # of the products
        self.work = torch.promote_types(dtype, torch.float32)
        self.hidden_UH = hidden_UH.to(dtype)
        self.weight_VH, self.bias_V = weight_VH, bias_V
        self.positions, self.words = tile
        self.inverse_U = temperature_U.to(self.work).reciprocal()
        self.cooled = bool((temperature_U != 1).any())
        self.buffer = hidden_UH.new_empty(self.positions * self.words, dtype=self.work)

        starts = list(range(0, len(hidden_UH), self.positions))
        stops = [len(position_N)] * len(starts)
        self.order_N: Tensor | None = None  # tokens by position, so that those of a tile's rows are neighbours
        if len(starts) > 1:
            position_N, self.order_N = position_N.sort(stable=True)
            target_N = target_N[self.order_N]
            stops[:-1] = torch.searchsorted(position_N, position_N.new_tensor(starts[1:])).tolist()
        self.target_N = target_N
        self.rows = [
            (slice(start, start + self.positions), tokens, position_N[tokens] - start)
            for start, tokens in zip(starts, map(slice, [0, *stops], stops), strict=False)
        ]

    def by_position(self, values_N: Tensor) -> Tensor:
        return values_N if self.order_N is None else values_N[self.order_N]

    def as_given(self, values_N: Tensor) -> Tensor:
        return values_N if self.order_N is None else torch.empty_like(values_N).index_copy_(0, self.order_N, values_N)

    def columns(self) -> list[slice]:
        return [slice(start, start + self.words) for start in range(0, len(self.weight_VH), self.words)]

    def logits(self, rows: slice, columns: slice, weight_CH: Tensor) -> Tensor:
        """logits_RC / temperature, in the one buffer. weight_CH: the columns of the weight, in self.dtype."""
        hidden_RH = self.hidden_UH[rows]
        z_RC = self.buffer[: len(hidden_RH) * len(weight_CH)].view(len(hidden_RH), len(weight_CH))
        if self.dtype == self.work:
            torch.mm(hidden_RH, weight_CH.t(), out=z_RC)
        else:
            z_RC.copy_(torch.mm(hidden_RH, weight_CH.t()))
        if self.bias_V is not None:
            z_RC.add_(self.bias_V[columns])
        if self.cooled:
            z_RC.mul_(self.inverse_U[rows].unsqueeze(1))
        return z_RC

    def targets(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(column in the tile, whether it is there or None for all) of each token's target."""
        target_M = self.target_N[tokens]
        if self.words == len(self.weight_VH):
            return target_M, None
        at_M = target_M - columns.start
        stop = min(columns.stop, len(self.weight_VH)) - columns.start
        return at_M.clamp(0, stop - 1), (at_M >= 0) & (at_M < stop)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_UH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        position_N: Tensor,
        target_N: Tensor,
        temperature_U: Tensor,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        device = hidden_UH.device.type
        dtype = torch.promote_types(hidden_UH.dtype, weight_VH.dtype)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            t = _Tiles(hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U, tile, dtype)
            top_U = hidden_UH.new_full(hidden_UH.shape[:1], torch.finfo(t.work).min / 2, dtype=t.work)
            sum_U, weighted_U = torch.zeros_like(top_U), torch.zeros_like(top_U)  # of e, of e * (z - top); e = exp(z - top)
            logit_N = hidden_UH.new_zeros(position_N.shape, dtype=t.work)
            buffer = torch.empty_like(t.buffer)
            for columns in t.columns() if len(position_N) > 0 else []:
                weight_CH = weight_VH[columns].to(dtype)
                for rows, tokens, row_M in t.rows:
                    z_RC = t.logits(rows, columns, weight_CH)
                    at_M, here_M = t.targets(tokens, columns)
                    found_M = z_RC[row_M, at_M]
                    logit_N[tokens] = found_M if here_M is None else torch.where(here_M, found_M, logit_N[tokens])
                    top_R = torch.maximum(top_U[rows], z_RC.amax(1))
                    z_RC.sub_(top_R.unsqueeze(1))
                    e_RC = torch.exp(z_RC, out=buffer[: z_RC.numel()].view(z_RC.shape))
                    moved_R = top_U[rows] - top_R
                    shrunk_R = moved_R.exp()
                    weighted_U[rows] = shrunk_R * (weighted_U[rows] + moved_R * sum_U[rows]) + z_RC.mul_(e_RC).sum(1)
                    sum_U[rows] = shrunk_R * sum_U[rows] + e_RC.sum(1)
                    top_U[rows] = top_R
            total_U = top_U + sum_U.log()
            logps_N = t.as_given(logit_N) - total_U[position_N]
            entropy_N = (sum_U.log() - weighted_U / sum_U)[position_N]

        one_tile = tile == (len(hidden_UH), len(weight_VH)) and len(position_N) > 0
        kept = buffer.view(tile) if one_tile and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(
            hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U, sum_U if one_tile else total_U, kept
        )
        ctx.tile, ctx.dtype = tile, dtype
        ctx.mark_non_differentiable(entropy_N)
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U, total_U, kept_UV = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_UH.device.type, enabled=False):
            t = _Tiles(hidden_UH, weight_VH, bias_V, position_N, target_N, temperature_U, ctx.tile, ctx.dtype)
            make = torch.empty_like if len(position_N) > 0 else torch.zeros_like
            d_hidden_UH = hidden_UH.new_zeros(hidden_UH.shape, dtype=t.work) if needs_hidden else None
            d_weight_VH = make(weight_VH) if needs_weight else None
            d_bias_V = make(bias_V) if needs_bias else None
            g_N = g_N * t.inverse_U[position_N]
            g_U = torch.zeros_like(t.inverse_U).index_add_(0, position_N, g_N)
            g_N = t.by_position(g_N)
            for columns in t.columns() if len(position_N) > 0 else []:
                weight_CH = weight_VH[columns].to(t.dtype)
                tile_CH = tile_C = None
                if d_weight_VH is not None:
                    tile_CH = d_weight_VH[columns]
                    if tile_CH.dtype != t.work:
                        tile_CH = torch.empty_like(tile_CH, dtype=t.work)
                if d_bias_V is not None:
                    tile_C = t.inverse_U.new_zeros(len(weight_CH))
                for rows, tokens, row_M in t.rows:
                    if kept_UV is not None:
                        d_RC = torch.mul(kept_UV, (-g_U / total_U).unsqueeze(1), out=t.buffer.view(kept_UV.shape))
                    else:
                        d_RC = t.logits(rows, columns, weight_CH).sub_(total_U[rows].unsqueeze(1)).exp_()
                        d_RC.mul_(g_U[rows].neg().unsqueeze(1))
                    at_M, here_M = t.targets(tokens, columns)
                    g_M = g_N[tokens] if here_M is None else g_N[tokens] * here_M
                    d_RC.index_put_((row_M, at_M), g_M, accumulate=True)
                    if tile_C is not None:
                        tile_C += d_RC.sum(0)
                    d_RC = d_RC.to(t.dtype)
                    if d_hidden_UH is not None:
                        _product(d_hidden_UH[rows], d_RC, weight_CH, add=columns.start > 0)
                    if tile_CH is not None:
                        _product(tile_CH, d_RC.t(), t.hidden_UH[rows], add=rows.start > 0)
                if d_weight_VH is not None and tile_CH is not None and tile_CH.dtype != d_weight_VH.dtype:
                    d_weight_VH[columns] = tile_CH
                if d_bias_V is not None and tile_C is not None:
                    d_bias_V[columns] = tile_C
        d_hidden = None if d_hidden_UH is None else d_hidden_UH.to(hidden_UH.dtype)
        return d_hidden, d_weight_VH, d_bias_V, None, None, None, None


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b; the sum is in out's dtype where that is wider."""
    if out.dtype != a.dtype:
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
