"""`make bench-generate`, second part: engines `vllm` and `vllm_server` against LLM.generate called directly, in turns.

    python -m tests.bench.generate_vllm [--model FOLDER] [--prompts N] [--max-tokens N] [--repeat N]      in the vllm environment

One idea: what does going through dypo cost? The same engine answers the same prompts, k samples at temperature 1 with log-probs
and seeds, once by one LLM.generate of all prompts with n = k, and once through ours: work list, one request a sample, text, rows.
The server is vLLM's own, started on the same policy with the same settings. All stop at max_tokens alone, so all do the same
number of tokens. The probe, which a stage does once however many rows it has, is timed by itself. Exit code 1: more than 5 % slower.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.engines import vllm
from pipeline.engines.base import Ask, Sampling
from pipeline.engines.hf import unfinished_batches
from pipeline.engines.vllm_server import VLLMServerSampler
from pipeline.policy import Renderer, policy_id
from schemas.recipe import Policy, VLLMEngine, VLLMServerEngine
from tests.bench.prompts import SMOLLM2, TINY, asks
from tests.vllm_server import vllm_server

CEILING = 1.05  # times the seconds of LLM.generate


class Endless(Renderer):
    """The policy's renderer, but nothing ends a response: a time then is a time for a number of tokens."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.eos_ids = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMOLLM2 if SMOLLM2.is_dir() else TINY)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    folder = args.model.resolve()
    work = asks(folder, args.prompts, args.k)
    renderer, sampling = Endless(folder), Sampling(1.0, 1.0, args.max_tokens)
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    reference = _reference(folder, policy)
    config = VLLMEngine.model_validate({"type": "vllm", "enforce_eager": True})
    in_process = vllm.VLLMSampler(folder, policy, config, sampling, renderer, reference)
    length = max(len(a.prompt_tokens or ()) for a in work) + args.max_tokens
    engine = in_process._ready(length, work)
    rows = [row for batch in unfinished_batches(work, 4096, frozenset()) for row in batch]
    missed = []
    with vllm_server(folder, length) as address:
        config = VLLMServerEngine.model_validate({"type": "vllm_server", "base_url": address})
        server = VLLMServerSampler(folder, policy_id(folder), policy, config, sampling, renderer, reference)
        model, length = server._ask(server._ready(work))
        sides: dict[str, Callable[[], Any]] = {
            "LLM.generate": lambda: _direct(engine.llm, work, args.max_tokens),
            "vllm": lambda: _tokens(in_process._sample(engine, rows)),
            "vllm_server": lambda: _tokens(server._ask(server._sample(model, length, rows))),
        }
        probes = {"vllm": lambda: in_process._ready(length, work), "vllm_server": lambda: server._ask(server._ready(work))}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeat):
            for name, side in sides.items():
                began = time.perf_counter()
                tokens = side()
                seconds[name].append(time.perf_counter() - began)
                assert tokens == len(rows) * args.max_tokens, f"{name}: {tokens} tokens"
        for name, ready in probes.items():
            began = time.perf_counter()
            ready()
            print(f"{name}: {time.perf_counter() - began:.1f} s for a probe, once a stage")
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds["LLM.generate"], strict=True))
        rate = args.prompts * args.k * args.max_tokens / statistics.median(each)
        print(
            f"{folder.name}: {args.prompts} prompts x {args.k}, {args.max_tokens} tokens each: {name} {rate:,.0f} tok/s, {ratio:.2f} times LLM.generate's seconds"
        )
        missed += [name] if ratio > CEILING else []
    vllm.shut_down()
    if missed:
        sys.exit(f"more than {CEILING - 1:.0%} slower than LLM.generate: {', '.join(missed)}")


def _direct(llm: Any, work: list[Ask], max_tokens: int) -> int:
    """One call, as vLLM's documentation has it."""
    new = importlib.import_module("vllm").SamplingParams
    params = [
        new(
            n=len(a.samples),
            temperature=1.0,
            max_tokens=max_tokens,
            seed=a.seed,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
        )
        for a in work
    ]
    answers = llm.generate([{"prompt_token_ids": a.prompt_tokens} for a in work], params, use_tqdm=False)
    return sum(len(out.token_ids) for answer in answers for out in answer.outputs)


def _tokens(rows: list[Any]) -> int:
    return sum(len(row.tokens) for row in rows)


def _reference(folder: Path, policy: Policy) -> Any:
    """The trainer's forward, loaded once, as the command has it."""
    from trainer import api

    model = api.load_model(folder, policy)
    return lambda prompt, tokens, temperature: api.sequence_logprobs(model, prompt, tokens, temperature)


if __name__ == "__main__":
    main()
