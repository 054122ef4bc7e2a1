"""The GPU engine: vLLM in process. `pip install dypo[vllm]`, or vLLM's CPU build (`make venv-vllm`).

One idea: vLLM only turns token ids into token ids. Prompts go in as ids, the stop ids come from our renderer, text is
derived by our renderer, and vLLM's own tokenizer and the model's generation_config are left out, so nothing but the
recipe decides how is sampled. Each sample is one request whose seed is derived from its prompt's, so a group that is
partly finished costs only what is missing; prefix caching computes the prompt once.

vLLM's log-probabilities are of the raw logits unless told otherwise: `processed_logprobs` makes them
log softmax(logits / temperature) (greedy: temperature 1). With top_p < 1, evaluation only, they are over the kept tokens.

An engine that silently serves other weights than the policy's is the worst fault there is, so before anything is sampled
a probe compares its log-probabilities with a reference forward, and refuses above `max_logprob_difference`.

One engine outlives the stages of a process, since starting one takes up to minutes: the next stage that samples another
policy of the same shape reloads its weights in place and resets the prefix cache. That can go wrong without a word (vLLM's
CPU build keeps the old head of a model with tied embeddings; kept cache blocks are the old policy's), so the probe is
stricter then: no farther from the reference than twice what the engine was when it started. If it is, the engine is started anew.
`shut_down` gives its memory back; training calls it first.

Seeds on the CPU build need chunked prefill off ("CPU Generator does not use offset"); each row's `sampling` says what was.
"""

import atexit
import importlib
import json
import math
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.engines import probe, reaper
from pipeline.engines.base import Ask, Failure, Finished, Sample, Sampling
from pipeline.engines.hf import Row, unfinished_batches
from pipeline.policy import Renderer
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import Policy, VLLMEngine

RELOADED, ROUNDING = 2.0, 1e-4  # a kept engine's mean difference: at most so many times a fresh one's, and so much more
CPU_CACHE_BYTES = 2**30  # keys and values of the sequences that vLLM's CPU build works on at once
BATCHED_TOKENS = 8192  # tokens of one engine step without chunked prefill, at least
LOOK_EVERY_S = 1.0  # whether the engine's processes live
T = TypeVar("T")


class EngineDied(Exception):
    """A process of the engine ended while it was asked something."""


@dataclass
class _Engine:
    """A started engine: what it was started with, whose weights it has, and how far from the reference it was at first."""

    llm: Any
    options: dict[str, Any]  # all that a reload cannot change
    length: int  # max_model_len
    folder: Path
    processes: list[Any]
    reaper: Any  # kills the processes if this one is killed: vLLM's live on
    prompts: list[list[int]]  # those of its last probe, which its prefix cache may hold
    noise: float = 0.0


_live: _Engine | None = None


def shut_down() -> None:
    """Ends the engine that is kept, if there is one, and gives its memory back."""
    global _live
    if _live is not None:
        _live.llm.llm_engine.engine_core.shutdown()
        if _live.reaper is not None:
            _live.reaper.kill()
            _live.reaper.communicate()
        _live = None


class VLLMSampler:
    """Samples the policy in `folder`; the engine starts when there is something to do, and is kept for the next sampler."""

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        config: VLLMEngine,
        sampling: Sampling,
        renderer: Renderer,
        reference: probe.Reference,
    ) -> None:
        self.folder, self.policy, self.config = folder, policy, config
        self.sampling, self.renderer, self.reference = sampling, renderer, reference
        self.seeded = config.seeded
        self.probed: float | None = None  # the largest log-prob difference that the last probe saw
        self._note = "{}"
        self._vllm: Any = None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """One list for each planned batch that has unfinished samples; only those are asked for."""
        batches = unfinished_batches(asks, self.config.batch_sequences, finished)
        if not batches:
            return
        longest = max(len(ask.prompt_tokens or ()) for rows in batches for ask, _ in rows)
        try:
            engine = self._ready(longest + self.sampling.max_tokens, [ask for rows in batches for ask, _ in rows])
            for rows in batches:
                yield self._sample(engine, rows)
        except BaseException as e:
            shut_down()  # whatever state it is in now, nothing samples from it again
            if isinstance(e, EngineDied) or type(e).__name__ == "EngineDeadError":
                raise WorkError(
                    f"{self.folder}: vLLM's engine died while it sampled ({e}). Finished rows are kept; run the same command "
                    "again to go on. Killed for memory? Lower rollouts.engine.gpu_memory_utilization or batch_sequences"
                ) from None
            raise

    def _ready(self, tokens: int, asks: list[Ask]) -> _Engine:
        """An engine with this policy's weights, probed: the kept one if it can be, else a new one."""
        global _live
        self._load()
        options = self._options()
        if _live is not None and _live.options == options and _live.length >= self._length(tokens):
            found = self._refresh(_live, asks)
            if max(found) <= self._limit and self._noise(found) <= RELOADED * _live.noise + ROUNDING:
                self.probed = max(found)
                return _live
        shut_down()
        _live = self._start(options, self._length(tokens))
        found = self._differences(_live, asks, [])
        self.probed, _live.noise = max(found), self._noise(found)
        if self.probed > self._limit:
            raise WorkError(
                f"{self.folder}: refused to sample. At temperature {self.sampling.temperature}, a probe's log-probs: expected "
                f"the reference's within {self._limit}, found a difference of {self.probed:.5f} in vLLM. Its weights or its "
                "log-prob mode are not the policy's; in bfloat16 small differences are normal: then raise "
                "rollouts.engine.max_logprob_difference. Or use rollouts.engine.type = 'hf'"
            )
        return _live

    def _refresh(self, engine: _Engine, asks: list[Ask]) -> list[float]:
        """Gives a kept engine this policy's weights; the differences of a probe, infinite if they could not be loaded."""
        before, weights = engine.prompts, {"weights_path": str(self.folder)}
        try:
            if engine.folder != self.folder:
                _watched(engine, lambda: engine.llm.collective_rpc("reload_weights", kwargs=weights))
                if not _watched(engine, engine.llm.reset_prefix_cache):  # blocks of the old policy are left
                    return [math.inf]
                engine.folder = self.folder
            return self._differences(engine, asks, before)
        except Exception:  # whatever vLLM says: a new engine is the way out, and says it again if it cannot load them either
            return [math.inf]

    @property
    def _limit(self) -> float:
        return self.config.max_logprob_difference or probe.LIMITS[self.policy.dtype]

    def _noise(self, found: list[float]) -> float:
        """Mean difference, as of logits: a log-prob at temperature T has 1/T of it."""
        return sum(found) / len(found) * (self.sampling.temperature or 1.0)

    def _load(self) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:  # by name: this file is called vllm too, and tools take it for the package
            self._vllm = importlib.import_module("vllm")
        except ImportError as e:
            raise UserError(
                f"engine 'vllm': expected vLLM in this environment, found none that imports ({e}). On a GPU machine: "
                "pip install 'dypo[vllm]'; on a CPU: make venv-vllm. Or set rollouts.engine.type = 'hf'"
            ) from None

    def _length(self, tokens: int) -> int:
        """max_model_len: the recipe's, or room for sequences of `tokens` within the policy's context."""
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False).get_text_config()
        context = getattr(text, "max_position_embeddings", None) or tokens
        return self.config.max_model_len or min(tokens, context)

    def _options(self) -> dict[str, Any]:
        """What the engine is started with, but for the weights and max_model_len."""
        config = json.loads((self.folder / "config.json").read_text())
        options: dict[str, Any] = {
            "dtype": self.policy.dtype,
            "tensor_parallel_size": self.config.tensor_parallel_size,
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "enforce_eager": self.config.enforce_eager,
        }
        platform = importlib.import_module("vllm.platforms").current_platform
        if platform.is_cpu():  # else it wants gpu_memory_utilization of all memory to be free; VLLM_CPU_KVCACHE_SPACE wins
            options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        options["whole_prefill"] = self.seeded and platform.is_cpu()
        note = {"vllm": self._vllm.__version__, "chunked_prefill": not options["whole_prefill"]}
        self._note = json.dumps(note, sort_keys=True)
        options["shape"] = {k: v for k, v in sorted(config.items()) if k not in ("_name_or_path", "transformers_version")}
        return options

    def _start(self, options: dict[str, Any], length: int) -> _Engine:
        given = {k: v for k, v in options.items() if k not in ("shape", "whole_prefill")}
        if options["whole_prefill"]:
            given |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(BATCHED_TOKENS, length)}
        others = set(multiprocessing.active_children())
        try:
            llm = self._vllm.LLM(
                model=str(self.folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                max_model_len=length,
                **given,
            )
        except (RuntimeError, ValueError) as e:
            raise WorkError(
                f"{self.folder}: vLLM's engine did not start: {e}. Its own lines above name the cause; often memory: lower "
                "rollouts.engine.gpu_memory_utilization or max_model_len, or set rollouts.engine.type = 'hf'"
            ) from e
        atexit.register(shut_down)
        processes = [p for p in multiprocessing.active_children() if p not in others]
        return _Engine(
            llm,
            options,
            int(llm.llm_engine.model_config.max_model_len),
            self.folder,
            processes,
            reaper.watch(p.pid for p in processes if p.pid),
            [],
        )

    def _differences(self, engine: _Engine, asks: list[Ask], more: list[list[int]]) -> list[float]:
        """|engine's log-prob - the reference's| of each token that it samples after the longest prompts, and after `more`."""
        engine.prompts = probe.prompts_for(asks, engine.length)
        prompts = engine.prompts + more
        params = [
            self._params(min(probe.TOKENS, engine.length - len(prompt)), seed_from("probe", n), top_p=1.0)
            for n, prompt in enumerate(prompts)
        ]
        found = [0.0]
        for prompt, answer in zip(prompts, _generate(engine, prompts, params), strict=True):
            tokens, logprobs = _unpack(answer.outputs[0])
            found += probe.differences(self.reference(prompt, tokens, self.sampling.temperature or 1.0), logprobs)
        return found

    def _params(self, tokens: int, seed: int, top_p: float) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=self.sampling.temperature,
            top_p=top_p,
            max_tokens=tokens,
            seed=seed if self.seeded else None,
            stop_token_ids=list(self.renderer.eos_ids),
            ignore_eos=True,  # but those: the engine would stop at what the config calls so, too
            logprobs=0,
            detokenize=False,
        )

    def _sample(self, engine: _Engine, rows: list[Row]) -> list[Sample | Failure]:
        out: list[Sample | Failure] = []
        fits: list[Row] = []
        limit = engine.length
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
        for (ask, sample), answer in zip(fits, _generate(engine, prompts, params), strict=True):
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


def _generate(engine: _Engine, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    if not prompts:
        return []
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return _watched(engine, lambda: engine.llm.generate(asked, params, use_tqdm=False))


def _watched(engine: _Engine, call: Callable[[], T]) -> T:
    """call(), or EngineDied: vLLM (0.32) waits for ever for an engine that was killed, so its processes are watched meanwhile."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as e:
            answer.put((None, e))

    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            found, failed = answer.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            if dead := [p for p in engine.processes if not p.is_alive()]:
                raise EngineDied(f"its process {dead[0].name} ended with {dead[0].exitcode}") from None
            continue
        if failed is not None:
            raise failed
        return found


def _unpack(completion: Any) -> tuple[list[int], list[float]]:
    """A completion's ids, end-of-sequence included, and the log-prob of each."""
    tokens = list(completion.token_ids)
    return tokens, [float(at[token].logprob) for token, at in zip(tokens, completion.logprobs, strict=True)]
