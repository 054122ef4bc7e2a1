"""`make bench-generate`: the embedded engine against transformers.generate, on the same prompts, one process on one core, in turns.

    python -m tests.bench.generate [--model FOLDER] [--prompts N] [--max-tokens N] [--repeat N] [--clock cpu] [--json]

One idea: tokens a second that somebody keeps. Both sample the same prompts k times at temperature 1 in the same batches (whole groups,
shortest prompts first), and only tokens up to end-of-sequence count. transformers.generate runs as TRL runs it: prompts padded on
the left, num_return_sequences = k, its default cache, no log-probs asked for; ours returns log-probs. Before anything is timed, greedy
answers have to be token for token those of generate, and log-probs those of a full forward. Exit code 1: below the floor.
Left out: the noise both draw differs, so the rows do, and their number of tokens with them.
"""

from tests.bench.machine import Clock, matmul_gflops, pin

CORE = pin()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pipeline.engines.base import Ask, Sample, Sampling  # noqa: E402
from pipeline.engines.hf import HFSampler, plan_batches  # noqa: E402
from pipeline.policy import Renderer  # noqa: E402
from schemas.recipe import HFEngine, Policy  # noqa: E402
from tests.bench.prompts import SMOLLM2, TINY, asks  # noqa: E402

FLOOR = 1.5
TOLERANCE = 1e-4  # of a log-prob against a full forward, float32


class Contest:
    """Both sides over one loaded model."""

    def __init__(self, folder: Path, work: list[Ask], max_tokens: int, batch: int) -> None:
        self.folder, self.work, self.max_tokens, self.batch = folder, work, max_tokens, batch
        self.renderer = Renderer(folder)
        self.sampler = self._sampler(1.0)
        self.model: Any = self.sampler._model()

    def _sampler(self, temperature: float) -> HFSampler:
        policy = Policy.model_validate({"model": self.folder, "device": "cpu", "threads": 1})
        sampling = Sampling(temperature, 1.0, self.max_tokens)
        return HFSampler(self.folder, policy, HFEngine(batch_sequences=self.batch), sampling, self.renderer)

    def ours(self) -> int:
        """Tokens kept."""
        return sum(len(row.tokens or ()) for row in self._rows(self.sampler, self.work))

    def theirs(self) -> int:
        return sum(len(tokens) for batch in plan_batches(self.work, self.batch) for tokens in self._generate(batch, True))

    def _rows(self, sampler: HFSampler, work: list[Ask]) -> list[Sample]:
        rows = [row for rows in sampler.run(work, frozenset()) for row in rows]
        assert all(isinstance(row, Sample) for row in rows), "a prompt was refused"
        return rows  # pyright: ignore[reportReturnType]

    def _generate(self, batch: list[tuple[Ask, int]], sample: bool) -> list[list[int]]:
        """Responses up to end-of-sequence, group by group."""
        groups = list({ask.prompt_id: ask for ask, _ in batch}.values())
        prompts = [ask.prompt_tokens or [] for ask in groups]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(
            do_sample=sample, max_new_tokens=self.max_tokens, num_return_sequences=len(batch) // len(groups) if sample else 1,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=list(self.renderer.eos_ids), pad_token_id=0,
        )  # fmt: skip
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        eos, kept = set(self.renderer.eos_ids), []
        for row in out[:, longest:].tolist():
            stop = next((t for t, token in enumerate(row) if token in eos), len(row) - 1)
            kept.append(row[: stop + 1])
        return kept

    def check(self, prompts: int = 16) -> float:
        """The largest log-prob difference from a full forward; AssertionError if greedy answers are not generate's."""
        some = [Ask(a.prompt_id, a.messages, (0,), a.seed, "", {}, a.prompt_tokens) for a in self.work[:prompts]]
        mine = {row.prompt_id: row for row in self._rows(self._sampler(0.0), some)}
        worst = 0.0
        for ask in some:  # one by one, so that padding rounds nothing
            tokens = mine[ask.prompt_id].tokens or []
            theirs = self._generate([(ask, 0)], False)[0]
            assert tokens == theirs, f"greedy answers differ for {ask.messages}: {tokens} and {theirs}"
            prompt = ask.prompt_tokens or []
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            full = logits.log_softmax(-1)[range(len(tokens)), tokens]
            worst = max(worst, (full - torch.tensor(mine[ask.prompt_id].logprobs)).abs().max().item())
        assert worst <= TOLERANCE, f"log-probs differ from a full forward by {worst:.1e}, more than {TOLERANCE}"
        return worst


def bench(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both, in turns, and their ratio."""
    tiny = folder == TINY
    prompts, max_tokens = args.prompts or (128 if tiny else 8), args.max_tokens or (64 if tiny else 48)
    contest = Contest(folder, asks(folder, prompts, args.k), max_tokens, args.batch)
    differ = contest.check(min(16, prompts))
    rates: dict[str, list[float]] = {"generate": [], "ours": []}
    peaks, tokens = [], {"generate": 0, "ours": 0}
    for _ in range(args.repeat):
        peaks.append(matmul_gflops())
        for name, side in (("generate", contest.theirs), ("ours", contest.ours)):
            began = Clock.read()
            kept = side()
            rates[name].append(kept / (Clock.read() - began))
            tokens[name] += kept
    ratio = statistics.median(b / a for a, b in zip(rates["generate"], rates["ours"], strict=True))
    mean = {name: n / args.repeat / prompts / args.k for name, n in tokens.items()}
    return {
        "model": folder.name, "prompts": prompts, "k": args.k, "batch": args.batch, "max_tokens": max_tokens,
        "mean_length": mean, "tokens_per_second": rates, "ratio": ratio, "logprobs_differ_by": differ,
        "matmul_gflops": statistics.median(peaks),
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    rate = {name: statistics.median(each) for name, each in found["tokens_per_second"].items()}
    return (
        f"{found['model']}: {found['prompts']} prompts x {found['k']}, batches of {found['batch']}, at most {found['max_tokens']} tokens "
        f"(mean {found['mean_length']['generate']:.1f}, {found['mean_length']['ours']:.1f}): generate {rate['generate']:,.0f} tok/s, "
        f"ours {rate['ours']:,.0f} tok/s, {found['ratio']:.2f}x; greedy tokens the same, log-probs within "
        f"{found['logprobs_differ_by']:.0e} of a full forward; matmul {found['matmul_gflops']:.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, action="append", help="default: the tiny policy, and SmolLM2 if it was fetched"
    )
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    if args.clock == "cpu":
        Clock.count_processor_time()
    folders = [m.resolve() for m in args.model or ()] or [TINY, *([SMOLLM2] if SMOLLM2.is_dir() else [])]
    found = []
    for folder in folders:
        found.append(bench(folder, args))
        if not args.json:
            print(line(found[-1]), flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    elif SMOLLM2 not in folders:
        print(f"{SMOLLM2}: not there, so not measured; data/fetch_smollm2.py makes it")
    if missed := [f["model"] for f in found if f["ratio"] < FLOOR]:
        sys.exit(f"below {FLOOR} times transformers.generate: {', '.join(missed)}")


if __name__ == "__main__":
    main()
