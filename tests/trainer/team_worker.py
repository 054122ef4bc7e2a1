"""What test_team.py runs under torchrun, or alone: rounds of training, one for each name given.

python -m tests.trainer.team_worker FOLDER POLICY NAME...      a NAME is SPREAD-DTYPE-STEPS, +lora: with an adapter,
                                                               +mean: ending in the mean with the base policy,
                                                               +golden: the tiny policy on the golden runs' rows

float64 is float64 throughout: transformers' norms round to float32 on the way, and 60 steps of AdamW make 1e-5 of a last
bit that falls to the other side.
"""

import os
import sys
from pathlib import Path

import torch

from schemas.recipe import Policy
from tests.golden.runs import BASE, golden_job
from tests.trainer.tiny import FolderSink, exact_norms, make_job, make_shards, make_train
from trainer import run
from trainer.job import TrainJob
from trainer.model import PolicyLM, load_model


def job_of(name: str, folder: Path, start: Path, every: int) -> TrainJob:
    kind, *flags = name.split("+")
    spread, dtype, steps = kind.split("-")
    how = {"steps": int(steps), "spread": spread, "checkpoint_every": every, "gradient_checkpointing": spread == "fsdp"}
    how |= {"lora": {"rank": 4, "alpha": 8}} if "lora" in flags else {}
    how |= {"base_weight": 0.25} if "mean" in flags else {}
    model = BASE if "golden" in flags else start
    policy = Policy.model_validate({"model": model, "device": "cpu", "dtype": dtype, "threads": 1})
    if "golden" in flags:
        return golden_job("default", FolderSink(folder), policy=policy, micro_batch_tokens=300, **how)
    train = make_train(prompts_per_step=5, micro_batch_tokens=30, **how)  # several micro-batches, and groups in pieces
    shards, rounds = make_shards(hard=5, mid=5, k=5), 1 if "mean" in flags else 2
    return make_job(start, FolderSink(folder), train=train, shards=shards, policy=policy, rounds=rounds)


def load_exactly(folder: Path, policy: Policy) -> PolicyLM:
    model = load_model(folder, policy)
    if policy.dtype == "float64":
        exact_norms(model.lm)  # type: ignore[arg-type]
    return model


def main() -> None:
    out, start, *names = sys.argv[1:]
    torch.set_num_threads(1)
    run.load_model = load_exactly
    for name in names:
        run.train_round(job_of(name, Path(out) / name, Path(start), int(os.environ.get("EVERY", "1000"))))


if __name__ == "__main__":
    main()
