"""The golden runs: eight steps of the tiny policy by each preset, from inputs that are in the repository.

One idea: nothing is sampled. `rollouts.jsonl` keeps what the base policy once answered (text, one character a token, and the
log-probs to four decimals), traces are the program teachers', verdicts and advantages are computed here. So the numbers
are the trainer's alone, and move only when its arithmetic does.
Left out: sampling (record.py) and comparing (test_golden.py).
"""

import json
import random
from pathlib import Path

import pyarrow as pa

from pipeline import tiny
from schemas.recipe import Policy, Train
from schemas.tables import ARROW
from tests.trainer.tiny import FolderSink, shard_row
from trainer.api import TrainJob, environment, train_round
from trainer.losses import grpo_advantages

HERE = Path(__file__).parent
BASE = HERE.parents[1] / "data" / "tiny_policy"
ROLLOUTS, GOLDEN = HERE / "rollouts.jsonl", HERE / "tiny.json"
TEMPERATURE = 0.8
POLICY = Policy(model=BASE, device="cpu", threads=1)
SETTINGS = {"steps": 8, "prompts_per_step": 6, "micro_batch_tokens": 1000, "checkpoint_every": 8}
OPTIMIZER = {"warmup_steps": 2, "decay": "cosine"}
METHODS = {  # the presets at a rate that moves this policy, and queues that fill
    "default": {"preset": "default", "lr": 3e-4},
    "paper": {"preset": "paper", "lr": 1e-4},
    "official": {"preset": "official", "lr": 3e-4, "sft_lr": 6e-4, "queue_size": 3, "queue_groups": 3},
}

Steps = list[dict[str, float]]


def golden_run(method: str, folder: Path) -> Steps:
    """Losses by component and gradient norms of every step."""
    sink = FolderSink(folder)
    job = golden_job(method, sink)
    train_round(job)
    steps: Steps = [{} for _ in range(job.train.steps)]
    for row in sink.rows("metrics"):
        if row["name"].startswith(("loss/", "grad_norm")):
            steps[row["step"]][row["name"]] = row["value"]
    return steps


def golden_job(method: str, sink: FolderSink, *, policy: Policy = POLICY, **more: object) -> TrainJob:
    """more: train settings other than those of the golden runs."""
    shards, ref = inputs()
    train = Train.model_validate(SETTINGS | {"method": {"type": "dypo"} | METHODS[method], "optimizer": OPTIMIZER} | more)
    graded = {"easy": 3, "mid": len(set(ref_prompts(shards))), "hard": 0}
    graded["hard"] = len(set(shards["prompt_id"].to_pylist())) - graded["mid"]
    return TrainJob(0, 1, 7, train, policy, BASE, shards, graded, sink, ref=ref)


def ref_prompts(shards: pa.Table) -> list[str]:
    return [p for p, route in zip(*(shards[n].to_pylist() for n in ("prompt_id", "route")), strict=True) if route == "rl"]


def inputs() -> tuple[pa.Table, pa.Table]:
    """(shards, reference log-probs): Mid groups of the recorded rollouts, traces of three teachers for Hard prompts."""
    groups: dict[str, list[dict]] = {}
    for line in ROLLOUTS.read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(row["prompt"], []).append(row)
    rows = []
    for problem, group in groups.items():
        right = [row["text"].endswith(tiny.EOS) and tiny.is_right(problem, row["text"][:-1]) for row in group]
        advantages = grpo_advantages([float(r) for r in right]).tolist()
        if not any(right):
            for name in ("left", "right", "rewrite"):
                trace = tiny.TEACHERS[name](problem, random.Random(0)) + tiny.EOS
                rows.append(shard_row("sft", problem, 0, prompt_ids(problem), ids(trace), teacher=name))
        elif not all(right):
            for sample, row in enumerate(group):
                more = {"old_logprobs": row["logprobs"], "reward": float(right[sample]), "correct": right[sample]}
                more |= {"advantage": advantages[sample], "group_size": len(group), "temperature": TEMPERATURE}
                more |= {"finish_reason": "stop" if row["text"].endswith(tiny.EOS) else "length"}
                rows.append(shard_row("rl", problem, sample, prompt_ids(problem), ids(row["text"]), **more))
    ref = [  # the base policy sampled them, so these are its log-probs
        {"round": 0, "role": "ref", "item_id": r["item_id"], "model": "base", "logprobs": r["old_logprobs"]}
        | {"temperature": r["temperature"]}
        for r in rows
        if r["route"] == "rl"
    ]
    return pa.Table.from_pylist(rows, ARROW["shards"]), pa.Table.from_pylist(ref, ARROW["logprobs"])


def prompt_ids(problem: str) -> list[int]:
    return ids(f"{tiny.BOS}{problem}=")


def ids(text: str) -> list[int]:
    return [tiny.ALPHABET.index(character) for character in text]


def here() -> dict[str, str | int]:
    """What the last bits of a golden run depend on, once it has run."""
    return environment(POLICY)
