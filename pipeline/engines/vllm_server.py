"""Engine `vllm_server`: a vLLM server of your own, which stays up from round to round and on whatever GPUs it has.

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs --generation-config vllm --host 127.0.0.1

One idea: the server is told whose weights it has. Before a stage samples, `weight_info` has to name this policy (or the server
was started on its folder and never reloaded): else it is paused, reloads the folder's weights, drops its prefix cache and takes the
policy's content id as its weight version. Then a probe holds its log-probs against the trainer's forward. After every
batch the version is asked for again, and rows of a server that was restarted or reloaded by somebody else meanwhile are not kept.

The folder has to be readable for the server under the same path. Dev mode opens endpoints that anyone who reaches the port can
call: keep it on loopback. Prompts go in and answers come out as token ids; each sample is a request of its own, with its own
seed. On the CPU build seeds want --no-enable-chunked-prefill, and tied embeddings reload wrongly: where the policy moved by more
than the probe's limit it is refused, and the way out is a server started on the new folder. In bfloat16 that limit is 0.05, and
less than that the probe cannot see.
"""

import asyncio
import importlib
import json
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.engines import probe
from pipeline.engines.base import Ask, Failure, Finished, Sample, Sampling
from pipeline.engines.hf import Row, unfinished_batches
from pipeline.policy import Renderer
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import Policy, VLLMServerEngine

T = TypeVar("T")
NEVER_RELOADED = "default"  # the weight version of a server that nobody gave another


class VLLMServerSampler:
    """Samples the policy in `folder`, whose content id is `policy_id`, on the server at `config.base_url`."""

    name = "vllm_server"

    def __init__(
        self,
        folder: Path,
        policy_id: str,
        policy: Policy,
        config: VLLMServerEngine,
        sampling: Sampling,
        renderer: Renderer,
        reference: probe.Reference,
    ) -> None:
        self.folder, self.policy_id, self.config = folder, policy_id, config
        self.sampling, self.renderer, self.reference = sampling, renderer, reference
        self.seeded = config.seeded
        self.limit = config.max_logprob_difference or probe.LIMITS[policy.dtype]
        try:
            self._openai = importlib.import_module("openai")
        except ImportError:
            raise UserError("engine 'vllm_server' needs the package openai: pip install dypo[openai]") from None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Sample | Failure]]:
        """One list for each planned batch that has unfinished samples; only those are asked for."""
        batches = unfinished_batches(asks, self.config.batch_sequences, finished)
        if not batches:
            return
        model, length = self._ask(self._ready([ask for rows in batches for ask, _ in rows]))
        for rows in batches:
            yield self._ask(self._sample(model, length, rows))

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work`; whatever the server did instead of answering is a WorkError."""
        try:
            return asyncio.run(work)
        except self._openai.APIStatusError as e:
            raise WorkError(f"{self._where}: answered {e.status_code} to {e.request.url.path}: {_short(e)}") from None
        except self._openai.APIConnectionError as e:
            raise WorkError(
                f"{self._where}: no answer ({_short(e)}). Finished rows are kept; start the server and run the same command again"
            ) from None

    @property
    def _where(self) -> str:
        return f"engine 'vllm_server' at {self.config.base_url}"

    def _client(self, path: str = "") -> Any:
        return self._openai.AsyncOpenAI(
            base_url=self.config.base_url.rstrip("/") + path,
            api_key="none",
            timeout=self.config.timeout_s,
            max_retries=self.config.retries,
        )

    async def _ready(self, asks: list[Ask]) -> tuple[str, int]:
        """The served model's name and its max_model_len, once the server has this policy's weights and has shown it."""
        model, length, root, version = await self._standing()
        started_on = version == NEVER_RELOADED and Path(root).absolute() == self.folder.absolute()
        if version != self.policy_id and not started_on:
            await self._reload()
        await self._probe(model, length, asks)
        self._expected = (model, length, root, version if started_on else self.policy_id)
        return model, length

    async def _standing(self) -> tuple[str, int, str, str]:
        """The served model's name, its max_model_len, the folder that the server was started on, and its weight version."""
        async with self._client("/v1") as client:
            card = (await client.models.list()).data[0]
        length = int(getattr(card, "max_model_len", 0))
        if not length:
            raise UserError(f"{self._where}: expected vLLM, whose /v1/models tells max_model_len; found another server")
        return card.id, length, str(getattr(card, "root", "")), await self._version()

    async def _version(self) -> str:
        async with self._client() as client:
            try:
                return (await client.get("/weight_info", cast_to=dict[str, Any]))["weight_version"]
            except self._openai.NotFoundError:
                raise UserError(
                    f"{self._where}: expected to be told whose weights it has, found no /weight_info. Start it with "
                    "VLLM_SERVER_DEV_MODE=1, on loopback"
                ) from None

    async def _reload(self) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder.absolute())}}
        async with self._client() as client:
            await client.post("/pause?mode=wait", cast_to=object)
            try:
                await client.post("/update_weight_version", body={"new_version": "half loaded"}, cast_to=object)
                await client.post("/collective_rpc", body=call, cast_to=object)
                reset = await client.post("/reset_prefix_cache", cast_to=dict[str, Any])
                if not reset.get("success"):
                    raise WorkError(
                        f"{self._where}: its prefix cache was not reset, so it would answer from the old policy's. Start it anew"
                    )
                await client.post("/update_weight_version", body={"new_version": self.policy_id}, cast_to=object)
            finally:
                await client.post("/resume", cast_to=object)

    async def _probe(self, model: str, length: int, asks: list[Ask]) -> None:
        """WorkError if the server's log-probs of what it samples are not the reference's."""
        found = [0.0]
        async with self._client("/v1") as client:
            for n, prompt in enumerate(probe.prompts_for(asks, length)):
                tokens = min(probe.TOKENS, length - len(prompt))
                ids, logprobs = _unpack(await self._complete(client, model, prompt, tokens, seed_from("probe", n), 1.0))
                found += probe.differences(self.reference(prompt, ids, self.sampling.temperature or 1.0), logprobs)
        worst = max(found)
        if worst > self.limit:
            raise WorkError(
                f"{self._where}: refused to sample {self.folder}. At temperature {self.sampling.temperature}, a probe's log-probs: "
                f"expected the reference's within {self.limit}, found a difference of {worst:.5f}. Start the server anew on "
                "this folder, with --logprobs-mode processed_logprobs --generation-config vllm; in bfloat16 small differences are "
                "normal: then raise rollouts.engine.max_logprob_difference"
            )

    async def _sample(self, model: str, length: int, rows: list[Row]) -> list[Sample | Failure]:
        gate = asyncio.Semaphore(self.config.concurrency)

        async def one(ask: Ask, sample: int) -> Sample | Failure:
            prompt = ask.prompt_tokens or []
            if not 0 < len(prompt) < length:
                why = f"the rendered prompt has {len(prompt)} tokens; the server reads 1 to {length - 1} (max_model_len {length})"
                return Failure(ask.prompt_id, sample, why)
            tokens = min(self.sampling.max_tokens, length - len(prompt))
            async with gate:
                choice = await self._complete(
                    client, model, prompt, tokens, seed_from(ask.seed, sample), self.sampling.top_p
                )
            if choice.finish_reason not in ("stop", "length"):
                return Failure(ask.prompt_id, sample, f"vLLM ended it with '{choice.finish_reason}'")
            ids, logprobs = _unpack(choice)
            return Sample(
                prompt_id=ask.prompt_id,
                sample=sample,
                text=self.renderer.text(ids),
                finish_reason=choice.finish_reason,
                sampling=json.dumps({"server": self.config.base_url}),
                tokens=ids,
                logprobs=logprobs,
            )

        async with self._client("/v1") as client:
            found = await asyncio.gather(*(one(ask, sample) for ask, sample in rows))
        if (now := await self._standing()) != self._expected:
            raise WorkError(
                f"{self._where}: expected it to be {self._expected} still (model, length, root, weight version), found {now}: it was "
                "restarted, or reloaded by "
                f"somebody else, while it sampled {self.folder}. The last {len(rows)} rows were not kept; run the same command again"
            )
        return found

    async def _complete(self, client: Any, model: str, prompt: list[int], tokens: int, seed: int, top_p: float) -> Any:
        answer = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=self.sampling.temperature,
            top_p=top_p,
            logprobs=0,
            seed=seed if self.seeded else None,
            extra_body={"return_token_ids": True, "stop_token_ids": list(self.renderer.eos_ids), "ignore_eos": True},
        )
        return answer.choices[0]


def _unpack(choice: Any) -> tuple[list[int], list[float]]:
    """A completion's ids, end-of-sequence included, and the log-prob of each."""
    ids, logprobs = getattr(choice, "token_ids", None), getattr(choice.logprobs, "token_logprobs", None)
    if ids is None or logprobs is None or len(ids) != len(logprobs):
        raise WorkError(
            "vLLM's server: expected token_ids and a log-prob for each of them, found a choice without. It has to know return_token_ids"
        )
    return ids, logprobs


def _short(e: Exception) -> str:
    return " ".join(str(e).split())[:300]
