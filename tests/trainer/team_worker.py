"""What test_team.py runs under torchrun, or alone: rounds of training with the job of tiny.py, one for each name given.

python -m tests.trainer.team_worker FOLDER POLICY NAME...      a NAME is SPREAD-DTYPE-STEPS or SPREAD-DTYPE-STEPS+lora
"""

import os
import sys
from pathlib import Path

import torch

from schemas.recipe import Policy
from tests.trainer.tiny import FolderSink, make_job, make_shards, make_train
from trainer.run import train_round


def job_of(name: str, folder: Path, policy: Path, **more: object) -> object:
    kind, _, lora = name.partition("+")
    spread, dtype, steps = kind.split("-")
    train = make_train(
        steps=int(steps),
        spread=spread,
        prompts_per_step=5,
        micro_batch_tokens=30,  # several micro-batches a step, and groups in pieces
        checkpoint_every=int(more.pop("checkpoint_every", steps)),  # type: ignore[call-overload]
        gradient_checkpointing=spread == "fsdp",
        lora={"rank": 4, "alpha": 8} if lora else None,
    )
    model = Policy.model_validate({"model": policy, "device": "cpu", "dtype": dtype, "threads": 1})
    return make_job(policy, FolderSink(folder), train=train, shards=make_shards(hard=5, mid=5, k=5), policy=model, **more)


def main() -> None:
    out, policy, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        folder = Path(out) / name
        train_round(job_of(name, folder, Path(policy), checkpoint_every=int(os.environ.get("EVERY", "1000"))))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
