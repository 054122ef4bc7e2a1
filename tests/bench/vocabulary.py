"""Memory and time of `trainer.vocabulary.token_logps`, forward and backward, beside the naive way (all logits, autograd).

    python -m tests.bench.vocabulary [memory] [time] [tiles] [--repeats N] [--json]        without a name: memory and time

memory: peak RSS of a fresh process above its RSS before the call, less the weight's gradient. time: naive and ours take
turns in one process; the figure is the median of the ratios of CPU time (one thread, so a busy machine moves it little).
tiles: time for several tile sizes.
Left out: CUDA, bfloat16.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.vocabulary import token_logps

ISSUE = (8192, 151_936, 896)  # tokens, vocabulary, hidden
BOTH_FIT = (2048, 32_000, 896)
SMALL_MODEL = (2000, 512, 256)
TILES = [(2048, 4096), (2048, 1024), (2048, 16_384), (512, 4096), (512, 16_384), (128, 32_000)]
MB = 1e6


def naive(
    hidden_UH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, position_N: Tensor, target_N: Tensor, temperature_U: Tensor
) -> tuple[Tensor, Tensor]:
    """The same numbers from the logits of every token."""
    logits_NV = torch.nn.functional.linear(hidden_UH, weight_VH, bias_V)[position_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logits_NV = logits_NV / temperature_U[position_N].to(logits_NV.dtype).unsqueeze(-1)
    total_N = logits_NV.logsumexp(-1)
    logps_N = logits_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1) - total_N
    with torch.no_grad():
        probs_NV = (logits_NV - total_N.unsqueeze(-1)).exp_()
        entropy_N = total_N - (probs_NV * logits_NV).sum(-1)
    return logps_N, entropy_N


def inputs(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, None, Tensor, Tensor, Tensor]:
    """One position a token, temperature 0.7."""
    torch.manual_seed(0)
    weight_VH = torch.empty(vocabulary, hidden).normal_(std=hidden**-0.5).requires_grad_()
    hidden_UH = torch.randn(tokens, hidden, requires_grad=True)
    return hidden_UH, weight_VH, None, torch.arange(tokens), torch.randint(vocabulary, (tokens,)), torch.full((tokens,), 0.7)


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(way: Callable[..., tuple[Tensor, Tensor]], size: tuple[int, int, int]) -> dict[str, float]:
    """What one call and its backward add at the peak, in this process, in MB: all, and without the weight's gradient."""
    logps_N, _ = way(*inputs(4, 8, 8))
    logps_N.sum().backward()  # what libraries take at first use is theirs
    given = inputs(*size)
    before = status("VmRSS")
    logps_N, _ = way(*given)
    logps_N.backward(torch.ones_like(logps_N))
    added = status("VmHWM") - before
    assert given[1].grad is not None
    return {"added_mb": added / MB, "beyond_weight_grad_mb": (added - given[1].grad.nbytes) / MB}


def ratios(size: tuple[int, int, int], tiles: list[tuple[int, int] | None], repeats: int) -> dict[str, dict[str, float]]:
    """CPU time of token_logps over the naive way's, taking turns."""
    given = inputs(*size)
    g_N = torch.randn(len(given[3]))

    def seconds(way: Callable[..., tuple[Tensor, Tensor]], **more: object) -> float:
        given[0].grad = given[1].grad = None
        start = time.process_time()
        way(*given, **more)[0].backward(g_N)
        return time.process_time() - start

    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        base = seconds(naive)
        for tile in tiles:
            ours = seconds(token_logps, tile=tile)
            if repeat > 0:  # the first is a warm-up
                found.setdefault("naive", []).append(base)
                found.setdefault("x".join(map(str, tile)) if tile else "default", []).append(ours / base)
    naive_s = statistics.median(found.pop("naive"))
    return {
        name: {"ratio": statistics.median(x), "low": min(x), "high": max(x), "naive_s": naive_s} for name, x in found.items()
    }


def child(code: str) -> dict:
    """The value of an expression of this module, from a fresh process with one thread."""
    lines = [
        "import json, torch",
        "torch.set_num_threads(1)",
        "from tests.bench.vocabulary import *",
        f"print(json.dumps({code}))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["memory", "time", "tiles", []])  # [] is for argparse: no name given
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    what_asked = asked.what or ["memory", "time"]
    results: list[dict] = []
    if "memory" in what_asked:
        for way, size in (("token_logps", ISSUE), ("token_logps", BOTH_FIT), ("naive", BOTH_FIT)):
            results.append({"what": "memory", "size": size, "way": way, **child(f"peak({way}, {size})")})
    for what, size, tiles, repeats in (
        ("time", BOTH_FIT, [None], asked.repeats),
        ("time", SMALL_MODEL, [None], 20 * asked.repeats),
        ("tiles", BOTH_FIT, TILES, asked.repeats),
    ):
        if what in what_asked:
            for way, row in child(f"ratios({size}, {tiles}, {repeats})").items():
                results.append({"what": what, "size": size, "way": way, **row})
    if asked.json:
        print(json.dumps(results, indent=1))
        return
    for r in results:
        size = "{:,} tokens x {:,} words x {:,}".format(*r["size"])
        if r["what"] == "memory":
            print(
                f"{size:36} {r['way']:12} peak {r['added_mb']:6.0f} MB, {r['beyond_weight_grad_mb']:6.0f} beyond the weight's gradient"
            )
        else:
            print(
                f"{size:36} {r['way']:12} {r['ratio']:.2f}x naive's time ({r['low']:.2f} to {r['high']:.2f}; {r['naive_s']:.3f} s)"
            )


if __name__ == "__main__":
    main()
