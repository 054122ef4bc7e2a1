"""The GPU engine: vLLM in process, for one stage. `pip install dypo[vllm]`, or vLLM's CPU build (`make venv-vllm`).

One idea: vLLM only turns token ids into token ids. Prompts go in as ids, the stop ids come from our renderer, text is
derived by our renderer, and vLLM's own tokenizer and the model's generation_config are left out, so nothing but the
recipe decides how is sampled. Each sample is one request whose seed is derived from its prompt's, so a group that is
partly finished costs only what is missing; prefix caching computes the prompt once.

vLLM's log-probabilities are of the raw logits unless told otherwise: `processed_logprobs` makes them
log softmax(logits / temperature) (greedy: temperature 1). With top_p < 1, evaluation only, they are over the kept tokens.

An engine that silently serves other weights than the policy's is the worst fault there is, so before anything is sampled
a probe compares its log-probabilities with a reference forward, and refuses above `max_logprob_difference`.

Seeds on the CPU build need chunked prefill off ("CPU Generator does not use offset"); each row's `sampling` says what was.
It leaves out weight reloading: an engine lives for one `run` and then gives its memory back.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.engines.base import Ask, Failure, Finished, Sample, Sampling
from pipeline.engines.hf import Row, plan_batches
from pipeline.policy import Renderer
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import Policy, VLLMEngine

Reference = Callable[[list[int], list[int], float], list[float]]
"""(prompt_tokens, tokens, temperature) -> log softmax(logits / temperature) of each token: the trainer's forward."""

PROBE_PROMPTS, PROBE_TOKENS = 4, 16
CPU_CACHE_BYTES = 2**30  # keys and values of the sequences that vLLM's CPU build works on at once
BATCHED_TOKENS = 8192  # tokens of one engine step without chunked prefill, at least


class VLLMSampler:
    """Samples the policy in `folder`; the engine starts when there is something to do, and ends with `run`."""

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        config: VLLMEngine,
        sampling: Sampling,
        renderer: Renderer,
        reference: Reference,
    ) -> None:
        self.folder, self.policy, self.config = folder, policy, config
        self.sampling, self.renderer, self.reference = sampling, renderer, reference
        self.seeded = config.seeded
        self.probed: float | None = None  # the largest log-prob difference that the last probe saw
        self._note = "{}"
        self._vllm: Any = None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """One list for each planned batch that has unfinished samples; only those are asked for."""
        batches = [
            [(ask, sample) for ask, sample in batch if (ask.prompt_id, sample) not in finished]
            for batch in plan_batches(asks, self.config.batch_sequences)
        ]
        batches = [rows for rows in batches if rows]
        if not batches:
            return
        longest = max(len(ask.prompt_tokens or ()) for rows in batches for ask, _ in rows)
        llm = self._start(longest + self.sampling.max_tokens)
        try:
            limit = int(llm.llm_engine.model_config.max_model_len)
            first = list({ask.prompt_id: ask for rows in batches for ask, _ in rows}.values())
            self._probe(llm, [ask for ask in first if 0 < len(ask.prompt_tokens or ()) < limit], limit)
            for rows in batches:
                yield self._sample(llm, rows, limit)
        finally:
            llm.llm_engine.engine_core.shutdown()

    def _start(self, tokens: int) -> Any:
        """The engine, with room for sequences of `tokens` (or the recipe's max_model_len, or the policy's context)."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:  # by name: this file is called vllm too, and tools take it for the package
            self._vllm = importlib.import_module("vllm")
            platform = importlib.import_module("vllm.platforms").current_platform
        except ImportError as e:
            raise UserError(
                f"engine 'vllm': expected vLLM in this environment, found none that imports ({e}). On a GPU machine: "
                "pip install 'dypo[vllm]'; on a CPU: make venv-vllm. Or set rollouts.engine.type = 'hf'"
            ) from None
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False).get_text_config()
        context = getattr(text, "max_position_embeddings", None) or tokens
        length = self.config.max_model_len or min(tokens, context)
        options: dict[str, Any] = {}
        if platform.is_cpu():  # else it wants gpu_memory_utilization of all memory to be free; VLLM_CPU_KVCACHE_SPACE wins
            options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        whole_prefill = self.seeded and platform.is_cpu()
        if whole_prefill:
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(BATCHED_TOKENS, length)}
        self._note = json.dumps({"vllm": self._vllm.__version__, "chunked_prefill": not whole_prefill}, sort_keys=True)
        try:
            return self._vllm.LLM(
                model=str(self.folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                dtype=self.policy.dtype,
                max_model_len=length,
                tensor_parallel_size=self.config.tensor_parallel_size,
                gpu_memory_utilization=self.config.gpu_memory_utilization,
                enforce_eager=self.config.enforce_eager,
                **options,
            )
        except (RuntimeError, ValueError) as e:
            raise WorkError(
                f"{self.folder}: vLLM's engine did not start: {e}. Its own lines above name the cause; often memory: lower "
                "rollouts.engine.gpu_memory_utilization or max_model_len, or set rollouts.engine.type = 'hf'"
            ) from e

    def _probe(self, llm: Any, asks: list[Ask], limit: int) -> None:
        """WorkError if the engine's log-probs of what it samples are not the reference's."""
        temperature = self.sampling.temperature
        self.probed = 0.0
        prompts = [ask.prompt_tokens or [] for ask in asks[:PROBE_PROMPTS]]
        params = [
            self._params(min(PROBE_TOKENS, limit - len(prompt)), seed_from("probe", n), top_p=1.0)
            for n, prompt in enumerate(prompts)
        ]
        for prompt, answer in zip(prompts, _generate(llm, prompts, params), strict=True):
            tokens, logprobs = _unpack(answer.outputs[0])
            expected = self.reference(prompt, tokens, temperature or 1.0)
            for t, (ours, theirs) in enumerate(zip(expected, logprobs, strict=True)):
                difference = abs(ours - theirs)
                self.probed = max(self.probed, difference)
                if not difference <= self.config.max_logprob_difference:
                    raise WorkError(
                        f"{self.folder}: refused to sample. At temperature {temperature}, token {t} of a probe: expected "
                        f"the reference's log-prob {ours:.5f} within {self.config.max_logprob_difference}, found "
                        f"{theirs:.5f} in vLLM. Its weights or its log-prob mode are not the policy's; in bfloat16 small "
                        "differences are normal: then raise rollouts.engine.max_logprob_difference. "
                        "Or use rollouts.engine.type = 'hf'"
                    )

    def _params(self, tokens: int, seed: int, top_p: float) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=self.sampling.temperature,
            top_p=top_p,
            max_tokens=tokens,
            seed=seed if self.seeded else None,
            stop_token_ids=list(self.renderer.eos_ids),
            logprobs=0,
            detokenize=False,
        )

    def _sample(self, llm: Any, rows: list[Row], limit: int) -> list[Sample | Failure]:
        out: list[Sample | Failure] = []
        fits: list[Row] = []
        for ask, sample in rows:
            length = len(ask.prompt_tokens or ())
            if 0 < length < limit:
                fits.append((ask, sample))
            else:
                why = f"the rendered prompt has {length} tokens; the engine reads 1 to {limit - 1} (max_model_len {limit})"
                out.append(Failure(ask.prompt_id, sample, why))
        prompts = [ask.prompt_tokens or [] for ask, _ in fits]
        params = [
            self._params(
                min(self.sampling.max_tokens, limit - len(prompt)), seed_from(ask.seed, sample), self.sampling.top_p
            )
            for prompt, (ask, sample) in zip(prompts, fits, strict=True)
        ]
        for (ask, sample), answer in zip(fits, _generate(llm, prompts, params), strict=True):
            completion = answer.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                out.append(Failure(ask.prompt_id, sample, f"vLLM ended it with '{completion.finish_reason}'"))
                continue
            tokens, logprobs = _unpack(completion)
            out.append(
                Sample(
                    prompt_id=ask.prompt_id,
                    sample=sample,
                    text=self.renderer.text(tokens),
                    finish_reason=completion.finish_reason,
                    sampling=self._note,
                    tokens=tokens,
                    logprobs=logprobs,
                )
            )
        return out


def _generate(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    if not prompts:
        return []
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def _unpack(completion: Any) -> tuple[list[int], list[float]]:
    """A completion's ids, end-of-sequence included, and the log-prob of each."""
    tokens = list(completion.token_ids)
    return tokens, [float(at[token].logprob) for token, at in zip(tokens, completion.logprobs, strict=True)]
