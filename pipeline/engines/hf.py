"""The embedded engine: any causal language model of transformers, decoded by our own loop on this machine.

One idea: a sample is a pure function of (seed, prompt, sample, position). Each sample owns a counter-based noise stream
(Philox, keyed by its prompt's seed and its index), and a token is the inverse CDF of softmax(logits / temperature) at one
uniform of that stream. Batches are planned from the whole work list, never from what is left of it, so a stage that was
interrupted between two batches ends bitwise in the rows of an undisturbed one.

Fast for a group of samples: the prompt is computed once and its keys and values copied to the samples, the cache grows in
place, and finished rows are dropped every few tokens.

    B   rows decoded together (samples)     P   prompts of the batch, left-padded to one length     V   vocabulary

It leaves out compilation, quantisation, beams, and penalties: the log-probabilities have to be the policy's own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.base import Ask, Failure, Finished, Sample, Sampling
from pipeline.policy import Renderer
from schemas.errors import UserError, WorkError
from schemas.recipe import HFEngine, Policy

DROP_EVERY = 4  # decode steps between two looks at which rows have finished
NOISE_BLOCK = 64  # positions of noise drawn at once for a row
CACHE_BLOCK = 64  # token slots by which the cache grows
DRAW_BYTES = 2**26  # of float64 probabilities at once

Row = tuple[Ask, int]  # one sample: its prompt, its index


def plan_batches(asks: Sequence[Ask], size: int) -> list[list[Row]]:
    """The work list cut into batches of at most `size` rows: shortest prompts first, groups whole.

    Only a group larger than `size` is cut. The plan depends on the asks alone, neither on their order nor on what is done.
    """
    batches: list[list[Row]] = []
    for ask in sorted(asks, key=lambda a: (len(a.prompt_tokens or ()), a.prompt_id)):
        group = [(ask, sample) for sample in ask.samples]
        if not batches or len(batches[-1]) + len(group) > size:
            batches.append([])
        batches[-1] += group[:size]
        batches += [group[i : i + size] for i in range(size, len(group), size)]
    return [batch for batch in batches if batch]


def unfinished_batches(asks: Sequence[Ask], size: int, finished: Finished) -> list[list[Row]]:
    """What is left of each planned batch, where something is."""
    batches = [[(a, s) for a, s in batch if (a.prompt_id, s) not in finished] for batch in plan_batches(asks, size)]
    return [batch for batch in batches if batch]


class HFSampler:
    """Samples the policy in `folder`; the model is loaded at the first batch that has something to do."""

    name = "hf"
    seeded = True

    def __init__(self, folder: Path, policy: Policy, config: HFEngine, sampling: Sampling, renderer: Renderer) -> None:
        import torch

        if policy.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "policy.device = 'cuda', but torch sees no CUDA device here. Use 'auto' or 'cpu', or install a CUDA "
                "build of torch"
            )
        self.folder, self.policy, self.sampling, self.renderer = folder, policy, sampling, renderer
        self.size = config.batch_sequences
        self._loaded: Any = None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """One list for each planned batch that has unfinished samples; only those are computed."""
        for rows in unfinished_batches(asks, self.size, finished):
            yield self._sample(rows)

    def _sample(self, rows: list[Row]) -> list[Sample | Failure]:
        model = self._model()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        failures: list[Sample | Failure] = []
        kept: list[Row] = []
        for ask, sample in rows:
            length = len(ask.prompt_tokens or ())
            if length == 0 or (context is not None and length >= context):
                why = f"the rendered prompt has {length} tokens; the policy reads 1 to {(context or 0) - 1}"
                failures.append(Failure(ask.prompt_id, sample, why))
            else:
                kept.append((ask, sample))
        return [*self._decode(model, kept, context), *failures] if kept else failures

    def _model(self) -> Any:
        if self._loaded is None:
            import torch
            from safetensors import SafetensorError
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging

            logging.disable_progress_bar()  # ours is told by the stage
            if self.policy.threads is not None:
                torch.set_num_threads(self.policy.threads)
            device = self.policy.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                model: Any = AutoModelForCausalLM.from_pretrained(
                    str(self.folder),
                    dtype=getattr(torch, self.policy.dtype),
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
            except (OSError, ValueError, SafetensorError) as e:
                raise UserError(
                    f"{self.folder}: expected a causal language model that transformers can load, found one that it cannot: "
                    f"{' '.join(str(e).split())}. Was the download or the save complete?"
                ) from None
            self._loaded = model.eval().to(device)
        return self._loaded

    def _decode(self, model: Any, rows: list[Row], context: int | None) -> list[Sample]:
        """Decodes `rows` together, to their end-of-sequence, `max_tokens` or the end of the policy's context."""
        import torch

        sampling, device = self.sampling, model.device
        asks = list({ask.prompt_id: ask for ask, _ in rows}.values())
        prompts = [ask.prompt_tokens or [] for ask in asks]
        place = {ask.prompt_id: p for p, ask in enumerate(asks)}
        longest = max(map(len, prompts))
        budgets = [
            min(sampling.max_tokens, context - len(ask.prompt_tokens or ()) if context else sampling.max_tokens)
            for ask, _ in rows
        ]
        steps = max(budgets)
        noise = None if sampling.temperature == 0 else _Noise(rows)

        with torch.inference_mode():
            ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
            seen_PT = torch.zeros(len(prompts), longest + steps, dtype=torch.long)
            for p, prompt in enumerate(prompts):
                ids_PT[p, longest - len(prompt) :] = torch.tensor(prompt)
                seen_PT[p, longest - len(prompt) :] = 1
            padded = any(len(prompt) < longest for prompt in prompts)
            positions_PT = (seen_PT[:, :longest].cumsum(-1) - 1).clamp(min=0)
            ids_PT, seen_PT, positions_PT = ids_PT.to(device), seen_PT.to(device), positions_PT.to(device)
            cache = _cache(model.config)
            logits = model(
                input_ids=ids_PT,
                attention_mask=seen_PT[:, :longest] if padded else None,
                position_ids=positions_PT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

            # From here one row a sample: the prompt's cache is copied to each of its samples.
            prompt_B = torch.tensor([place[ask.prompt_id] for ask, _ in rows], device=device)
            cache.reorder_cache(prompt_B)
            logits_BV, seen_BT = logits[prompt_B], seen_PT[prompt_B]
            position_B = positions_PT[:, -1][prompt_B]
            budget_B = torch.tensor(budgets, device=device)
            eos = torch.tensor(self.renderer.eos_ids, device=device)
            alive_B = torch.arange(len(rows), device=device)  # which sample each live row is
            done_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
            tokens = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
            logprobs = torch.zeros(len(rows), steps, dtype=torch.float32, device=device)
            for t in range(steps):
                uniform_B = None if noise is None else noise.at(t, alive_B)
                token_B, logprob_B = _draw(logits_BV, uniform_B, sampling, self.folder)
                tokens[alive_B, t], logprobs[alive_B, t] = token_B, logprob_B
                done_B = done_B | torch.isin(token_B, eos) | (t + 1 >= budget_B)
                if (t + 1) % DROP_EVERY == 0 or t + 1 == steps:
                    keep = (~done_B).nonzero()[:, 0]
                    if len(keep) == 0:
                        break
                    if len(keep) <= 0.9 * len(done_B):
                        cache.reorder_cache(keep)
                        alive_B, done_B, token_B = alive_B[keep], done_B[keep], token_B[keep]
                        position_B, budget_B, seen_BT = position_B[keep], budget_B[keep], seen_BT[keep]
                position_B = position_B + 1
                if context is not None:  # a finished row that is still in the batch may be past its end
                    position_B = position_B.clamp(max=context - 1)
                logits_BV = model(
                    input_ids=token_B[:, None],
                    attention_mask=seen_BT[:, : longest + t + 1] if padded else None,
                    position_ids=position_B[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
        return self._harvest(rows, budgets, tokens.tolist(), logprobs.tolist())

    def _harvest(
        self, rows: list[Row], budgets: list[int], tokens: list[list[int]], logprobs: list[list[float]]
    ) -> list[Sample]:
        samples = []
        for (ask, sample), budget, ids, logps in zip(rows, budgets, tokens, logprobs, strict=True):
            stop = next((t for t, token in enumerate(ids[:budget]) if token in self.renderer.eos_ids), None)
            length = budget if stop is None else stop + 1
            samples.append(
                Sample(
                    prompt_id=ask.prompt_id,
                    sample=sample,
                    text=self.renderer.text(ids[:length]),
                    finish_reason="length" if stop is None else "stop",
                    tokens=ids[:length],
                    logprobs=logps[:length],
                )
            )
        return samples


class _Noise:
    """One uniform in [0, 1) for each sample and position: row streams drawn block by block, whoever else is in the batch."""

    def __init__(self, rows: list[Row]) -> None:
        self._streams = [
            np.random.Generator(np.random.Philox(key=(ask.seed % 2**64) | (sample << 64))) for ask, sample in rows
        ]
        self._block = np.empty((len(rows), NOISE_BLOCK))

    def at(self, position: int, alive: Any) -> Any:
        """The uniforms of the rows `alive` at `position`; positions are asked for in order from 0."""
        import torch

        column = position % NOISE_BLOCK
        if column == 0:
            for row in alive.tolist():
                self._block[row] = self._streams[row].random(NOISE_BLOCK)
        return torch.from_numpy(self._block[:, column].copy()).to(alive.device)[alive]


def _draw(logits_BV: Any, uniform_B: Any, sampling: Sampling, folder: Path) -> tuple[Any, Any]:
    """One token a row and its log softmax(logits / temperature) over the whole vocabulary (greedy: at temperature 1)."""
    import torch

    scaled_BV = logits_BV.float() / (sampling.temperature or 1.0)
    normaliser_B = scaled_BV.logsumexp(-1)
    if not torch.isfinite(normaliser_B).all():
        raise WorkError(
            f"{folder}: expected finite logits, found NaN or infinity while sampling. The weights are broken, or "
            "overflow in this dtype: check the checkpoint, or set policy.dtype to the one it was trained in"
        )
    if uniform_B is None:
        token_B = scaled_BV.argmax(-1)
    else:
        rows = max(1, DRAW_BYTES // (8 * scaled_BV.shape[1]))
        parts = [
            _inverse_cdf(scaled_BV[i : i + rows].double().softmax(-1), uniform_B[i : i + rows], sampling.top_p)
            for i in range(0, len(scaled_BV), rows)
        ]
        token_B = torch.cat(parts)
    return token_B, scaled_BV.gather(-1, token_B[:, None])[:, 0] - normaliser_B


def _inverse_cdf(p_BV: Any, uniform_B: Any, top_p: float) -> Any:
    """The token at which the cumulated probability passes the uniform, in the order of the vocabulary.

    top_p < 1 keeps the likeliest tokens up to the one that reaches top_p, as everywhere.
    """
    import torch

    if top_p < 1:
        sorted_BV, order_BV = torch.sort(p_BV, dim=-1, descending=True, stable=True)
        sorted_BV = sorted_BV.masked_fill(sorted_BV.cumsum(-1) - sorted_BV >= top_p, 0.0)
        p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV)
    cumulated_BV = p_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]


def _cache(config: Any) -> Any:
    """transformers' cache for this model; its full-attention layers grow in place instead of by concatenation."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values [B, heads, slots, dim] with free slots behind the used ones; callers see views of those."""

        is_croppable = False

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._room = (key_states[:, :, :0], value_states[:, :, :0])
            used = self.get_seq_length()
            total = used + key_states.shape[2]
            if total > self._room[0].shape[2]:
                slots = -(-total // CACHE_BLOCK) * CACHE_BLOCK
                grown = []
                for old in self._room:
                    new = old.new_empty((*old.shape[:2], slots, old.shape[3]))
                    new[:, :, :used] = old[:, :, :used]
                    grown.append(new)
                self._room = (grown[0], grown[1])
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, used:total] = states
            self._show(total)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: Any) -> None:
            used = self.get_seq_length()
            self._room = (self._room[0].index_select(0, beam_idx), self._room[1].index_select(0, beam_idx))
            self._show(used)

        def _show(self, used: int) -> None:
            self.keys, self.values = self._room[0][:, :, :used], self._room[1][:, :, :used]

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
