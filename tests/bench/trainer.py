"""`make bench-trainer`: our step against TRL's GRPOTrainer, on the same stored rollouts, one process on one core, in turns.

    python -m tests.bench.trainer [--rows 32/25 ...] [--parts time memory update profile] [--repeat N] [--model FOLDER] [--json]

One idea: both compute the same update, and that is checked first (their gradients agree); then every repetition gives each side
and micro-batch size one turn, with a measurement of the machine's matmul peak beside it, so that a busy moment hits all alike. Each
side is reported at the better of its two micro-batch sizes, by the median. Exit code 1: a floor was missed.
Left out: several cores, GPUs, long prompts (docs/performance.md says what the rows mean).
"""

from tests.bench.machine import Clock, matmul_gflops, pin

CORE = pin()

import argparse  # noqa: E402  (pinned first)
import gc  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.bench import memory  # noqa: E402
from tests.bench.case import CASES, Case, make_model, make_shards, same_update, useful_flop  # noqa: E402
from tests.bench.ours import Ours, sampled_by  # noqa: E402
from tests.bench.trl_peer import Peer  # noqa: E402
from tests.bench.where import breakdown  # noqa: E402

AIM = 0.85  # of the arithmetic limit
MEMORY_CEILING = 0.6
PARTS = ("time", "memory", "update", "profile")


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.clock == "cpu":
        Clock.count_processor_time()
    say(
        f"core {CORE}, {args.clock} time, torch {torch.__version__}, trl {importlib.metadata.version('trl')}, {args.repeat} repetitions"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder) / "model")
        for name in args.rows:
            found.append(bench(CASES[name], model, Path(folder) / "shards.parquet", args))
            if not args.json:
                say(*lines(found[-1]), sep="\n")
    if args.json:
        print(json.dumps(found, indent=1))
    missed = [row["row"] for row in found if row.get("missed") or row.get("memory_missed")]
    if missed:
        sys.exit(f"below the floor, or above 0.6 of TRL's memory: {', '.join(missed)}")


def bench(case: Case, model: Path, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for about one row of the table. `file` is where the rows are put for the memory's processes."""
    batches = sorted({case.k, min(4, args.groups) * case.k})
    shards = sampled_by(model, make_shards(case, args.groups, model))
    pq.write_table(shards, file)
    result: dict[str, Any] = {"row": case.name, "groups": args.groups, "limit": case.limit}
    result["floor"] = case.floor if args.model is None else 0.0  # floors are the default model's
    best = {"TRL": batches[0], "ours": batches[0]}
    if "time" in args.parts:
        sides = [side(model, shards, case, batch=b) for b in batches for side in (Peer, Ours)]
        seconds, peaks, result["gradients_differ_by"] = _turns(sides, args.repeat)
        for name in best:
            best[name] = min(batches, key=lambda b: statistics.median(seconds[name, b]))
        result |= _timing(case, sides[0].model, seconds, best, peaks, args)
        _close(sides)
    if "update" in args.parts:
        whole = [Peer(model, shards, case, batch=best["TRL"], generate=True), Ours(model, shards, case, batch=best["ours"])]
        result["update"] = _whole(whole, args.repeat, rows=args.groups * case.k)
        _close(whole)
    if "memory" in args.parts:
        risen = {b: {s: memory.measure(s, case.name, b, model, file) for s in ("trl", "ours")} for b in batches}
        result["memory"] = [{"batch": b, **mb, "ratio": mb["ours"] / mb["trl"]} for b, mb in risen.items()]
        result["memory_missed"] = args.model is None and any(row["ratio"] > MEMORY_CEILING for row in result["memory"])
    if "profile" in args.parts:
        ours = Ours(model, shards, case, batch=best["ours"])
        ours.gradient()
        bins, rest = breakdown(ours)
        result["profile"] = {"bins": bins, "rest": rest}
    return result


def _turns(sides: list[Any], repeat: int) -> tuple[dict[tuple[str, int], list[float]], list[float], float]:
    """Seconds by side and micro-batch, the matmul peaks between, and how far the gradients differ at most.

    The first turn warms up, and is checked.
    """
    for side in sides:
        side.gradient()
    apart = max(same_update(sides[0].gradients(), side.gradients()) for side in sides[1:])
    seconds: dict[tuple[str, int], list[float]] = {(side.name, side.batch): [] for side in sides}
    peaks = []
    for _ in range(repeat):
        for side in sides:
            peaks.append(matmul_gflops())
            seconds[side.name, side.batch].append(side.gradient())
    return seconds, peaks, apart


def _timing(
    case: Case,
    model: torch.nn.Module,
    seconds: dict[tuple[str, int], list[float]],
    best: dict[str, int],
    peaks: list[float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    peak = statistics.median(peaks)
    sides = {}
    for name, flop in zip(("TRL", "ours"), useful_flop(model, case, args.groups), strict=True):
        median = statistics.median(seconds[name, best[name]])
        sides[name] = {
            "batch": best[name],
            "seconds": median,
            "tokens_per_second": args.groups * sum(case.lengths) / median,
            "gflops": flop / median / 1e9,
            "share_of_peak": flop / median / 1e9 / peak,
            "all_seconds": {str(b): times for (n, b), times in seconds.items() if n == name},
        }
    ratio = sides["TRL"]["seconds"] / sides["ours"]["seconds"]
    return {
        "ratio": ratio,
        "share_of_limit": ratio / case.limit,
        "missed": args.model is None and ratio < case.floor,
        "matmul_gflops": peak,
        "sides": sides,
    }


def _whole(whole: list[Any], repeat: int, *, rows: int) -> dict[str, float]:
    """Medians of a whole update in turns: TRL generates its own rollouts, ours are stored."""
    peer, ours = whole
    theirs, our_times, inside, lengths = [], [], [], []
    for at in range(repeat + 1):
        took = peer.update(), ours.update()
        if at > 0:
            theirs.append(took[0])
            our_times.append(took[1])
            inside.append(peer.inside)
            lengths.append(sum(peer.lengths) / rows)
    trl, stored = statistics.median(theirs), statistics.median(our_times)
    return {
        "TRL": trl,
        "TRL_loss_and_backward": statistics.median(inside),
        "TRL_mean_length": statistics.mean(lengths),
        "ours": stored,
        "ratio": trl / stored,
    }


def _close(sides: list[Any]) -> None:
    for side in sides:
        if isinstance(side, Peer):
            side.close()
    sides.clear()
    gc.collect()


def lines(row: dict[str, Any]) -> list[str]:
    """What a person reads of one row's result."""
    out = [f"\n{row['row']}  prompt/completion, k 8, {row['groups']} groups an update"]
    if "gradients_differ_by" in row:
        out[0] += f"; the two gradients differ by {row['gradients_differ_by']:.0e}"
    if "ratio" in row:
        verdict = "MISSED" if row["missed"] else "aim reached" if row["share_of_limit"] >= AIM else "floor reached"
        out.append(
            f"  loss+backward  {row['ratio']:.2f}x TRL   slots {row['limit']:.2f}   share {row['share_of_limit']:.2f} "
            f"(aim {AIM})" + (f"   floor {row['floor']}   {verdict}" if row["floor"] else "")
        )
        for name, side in row["sides"].items():
            spread = "   ".join(f"batch {b}: {min(t):.3f}-{max(t):.3f}" for b, t in side["all_seconds"].items())
            out.append(
                f"    {name:5} {side['seconds']:.3f} s   {side['tokens_per_second']:6.0f} completion tokens/s   "
                f"{side['gflops']:5.1f} GFLOP/s = {side['share_of_peak']:.0%} of {row['matmul_gflops']:.0f}   {spread}"
            )
    if "update" in row:
        u = row["update"]
        out.append(
            f"  whole update   {u['ratio']:.2f}x TRL   TRL {u['TRL']:.3f} s with generation (mean length {u['TRL_mean_length']:.0f}, "
            f"loss+backward {u['TRL_loss_and_backward']:.3f}), ours {u['ours']:.3f} s from stored rows"
        )
    for m in row.get("memory", []):
        out.append(
            f"  memory         batch {m['batch']}: TRL +{m['trl']:.0f} MB, ours +{m['ours']:.0f} MB   {m['ratio']:.2f}x "
            f"(at most {MEMORY_CEILING})"
        )
    if "profile" in row:
        total = sum(row["profile"]["bins"].values())
        out.append(f"  profile, seconds of {total:.3f} under the profiler")
        out += [f"    {seconds:.3f}  {seconds / total:4.0%}  {name}" for name, seconds in row["profile"]["bins"].items()]
        out += [f"             {seconds:.3f}  {name}" for name, seconds in row["profile"]["rest"].items()]
    return out


def say(*words: str, sep: str = " ") -> None:
    print(*words, sep=sep, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES), help="prompt/completion")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3])
    parser.add_argument("--repeat", type=int, default=5, help="turns of each side, after one that warms up")
    parser.add_argument("--groups", type=int, default=4, help="groups of 8 in an update")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is busy")
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder, say models/SmolLM2-135M-Instruct (with --groups 1)"
    )
    parser.add_argument("--json", action="store_true", help="figures on stdout")
    args = parser.parse_args()
    if args.groups % min(4, args.groups):
        parser.error(f"--groups {args.groups}: give 1, 2, 3 or a multiple of 4, so that both micro-batch sizes divide it")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json; expected a Hugging Face folder")
    return args


if __name__ == "__main__":
    main()
