"""Starts the ranks of a round on this machine with torch's own launcher (what the command `torchrun` is), and says how it ended.

One idea: whatever happens in the ranks, the process that started them says it, once. A rank writes what it has to say into
the file that the launcher named to it (pipeline/cli.py); one that was killed cannot, and one that only lost another rank
has nothing to say. Several machines: run `torchrun ... -m pipeline train RUN --round R` on each; this file is then not used.
"""

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from schemas.errors import INTERRUPTED, DypoError, Reported, UserError, WorkError
from trainer.team import LAUNCHER, LEFT_ALONE

PATIENCE_S = "5"  # how long a rank that was told to end may take: one that waits for another in C++ does not hear it
TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # signals that torch's launcher handles


def launch(command: list[str], processes: int, env: dict[str, str]) -> None:
    """Runs `command` as ranks 0 .. processes - 1 and waits; a signal to this process ends them first.

    Raises UserError or WorkError with what a rank refused or failed with, WorkError if one was killed, KeyboardInterrupt,
    and Reported if a rank ended with a traceback.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)  # ranks that each use all cores wait for each other
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": PATIENCE_S}
    env = {LAUNCHER: str(os.getpid()), **{key: os.environ.get(key, value) for key, value in defaults.items()}, **env}
    ended: BaseException | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="dypo-ranks-") as logs, _borrowed(env):
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
            elastic_launch(config, command[0])(*command[1:])
    except (ChildFailedError, SignalException) as e:
        ended = e
    if isinstance(ended, ChildFailedError):
        raise _why(ended.failures)
    if isinstance(ended, SignalException):
        if ended.sigval == signal.SIGINT:
            raise KeyboardInterrupt
        signal.raise_signal(ended.sigval)  # it ends this process as it would have without ranks


@contextmanager
def _borrowed(env: dict[str, str]) -> Iterator[None]:
    """This process's environment, signal handlers and log while torch's launcher has them; then as they were."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in TAKEN}
    disabled = logging.root.manager.disable
    os.environ.update(env)
    logging.disable(logging.CRITICAL)  # it tells of every signal and exit code, and so do we
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(before)


def _why(failures: dict[int, ProcessFailure]) -> BaseException:
    """failures: by rank, in the order in which they were seen. Those that only followed from another are no reason."""
    by_others = (-signal.SIGTERM, LEFT_ALONE)
    reasons = {rank: f for rank, f in failures.items() if f.exitcode not in by_others} or failures
    for f in reasons.values():
        if "exit_code" in f.error_file_data:
            return _said(f.message, f.error_file_data["exit_code"])
    for rank, f in reasons.items():
        if f.exitcode < 0:
            return _killed(rank, f"was killed by signal {-f.exitcode} ({f.signal_name()})")
    codes = {f.exitcode for f in reasons.values()}
    if INTERRUPTED in codes:
        return KeyboardInterrupt()
    if LEFT_ALONE in codes:
        return _killed(min(reasons), "lost the others")
    return Reported(1)


def _said(message: str, exit_code: int) -> DypoError:
    return UserError(message) if exit_code == UserError.exit_code else WorkError(message)


def _killed(rank: int, how: str) -> WorkError:
    return WorkError(
        f"train: rank {rank} {how}, so the other ranks were stopped. Checkpoints are kept; the same command goes on "
        "from the newest (killed for memory? Lower train.micro_batch_tokens)"
    )
