"""Starts the ranks of a round on this machine with torch's own launcher (what the command `torchrun` is), and says how it ended.

Several machines: run `torchrun ... -m pipeline train RUN --round R` on each; this file is then not used.
"""

import os
import tempfile
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from schemas.errors import Reported, WorkError
from trainer.team import LEFT_ALONE


def launch(command: list[str], processes: int, env: dict[str, str]) -> None:
    """Runs `command` as ranks 0 .. processes - 1 and waits.

    Raises Reported with a rank's exit code if it refused or failed and said why, WorkError if one was killed.
    """
    with tempfile.TemporaryDirectory(prefix="dypo-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        before = {key: os.environ.get(key) for key in env}
        os.environ.update(env)
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as e:
            raise _why(e) from None
        finally:
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.update({key: value})


def _why(e: ChildFailedError) -> Exception:
    codes = {rank: failure.exitcode for rank, failure in e.failures.items()}
    killed = {rank: code for rank, code in codes.items() if code < 0}
    told = [code for code in codes.values() if code in (1, 2, 130)]
    if told and not killed:
        return Reported(min(told))
    others = {rank: code for rank, code in codes.items() if code != LEFT_ALONE}
    rank, code = min((killed or others or codes).items())
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return WorkError(
        f"train: rank {rank} {how}, so the other ranks were stopped. Checkpoints are kept; the same command goes on "
        "from the newest (killed for memory? Lower train.micro_batch_tokens)"
    )
