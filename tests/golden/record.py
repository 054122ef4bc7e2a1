"""Records the golden runs: `make golden-record`. A change of tiny.json in a commit says that the arithmetic changed, and why.

`--rollouts` samples the base policy anew first, on the first problems of data/tiny/train.jsonl (Easy ones are left out): only
for another policy or another world, since the numbers of before then say nothing.
"""

import json
import sys
import tempfile
from pathlib import Path

from pipeline import tiny
from pipeline.engines.base import Ask, Sample, Sampling
from pipeline.engines.hf import HFSampler
from pipeline.policy import Renderer
from schemas.recipe import HFEngine
from tests.golden.runs import BASE, GOLDEN, METHODS, POLICY, ROLLOUTS, TEMPERATURE, golden_run, here, prompt_ids

PROBLEMS, K, MAX_TOKENS = 40, 6, 64


def record() -> None:
    """tiny.json: the environment, then the steps of each preset. JSON writes floats by repr, so nothing is rounded."""
    runs = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            runs[method] = golden_run(method, Path(folder))
    GOLDEN.write_text(json.dumps({"environment": here(), "runs": runs}, indent=1) + "\n")


def sample() -> None:
    """rollouts.jsonl: groups of K answers that are not all right."""
    lines = (BASE.parent / "tiny" / "train.jsonl").read_text().splitlines()[:PROBLEMS]
    problems = [json.loads(line)["prompt"] for line in lines]
    asks = [
        Ask(p, [{"role": "user", "content": p}], tuple(range(K)), seed, "", {}, prompt_ids(p))
        for seed, p in enumerate(problems)
    ]
    engine = HFSampler(BASE, POLICY, HFEngine(batch_sequences=96), Sampling(TEMPERATURE, 1.0, MAX_TOKENS), Renderer(BASE))
    groups: dict[str, list[Sample]] = {p: [] for p in problems}
    for batch in engine.run(asks, frozenset()):
        for got in batch:
            assert isinstance(got, Sample), got
            groups[got.prompt_id].append(got)
    out = []
    for problem, group in groups.items():
        if all(g.finish_reason == "stop" and tiny.is_right(problem, g.text) for g in group):
            continue
        for got in sorted(group, key=lambda g: g.sample):
            assert got.tokens is not None
            assert got.logprobs is not None
            text = "".join(tiny.ALPHABET[token] for token in got.tokens)
            row = {"prompt": problem, "text": text, "logprobs": [round(x, 4) for x in got.logprobs]}
            out.append(json.dumps(row, separators=(",", ":")))
    ROLLOUTS.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    if "--rollouts" in sys.argv:
        sample()
    record()
