"""One process or several, seen from the round: who leads, how the model is spread, how gradients and numbers come together.

One idea: `ALONE` is a team of one, so that the loop has one text. A team is what torchrun started: `join` reads its
environment. The leader, rank 0, does everything that touches the run folder; the others read it and compute.

    ddp    each rank holds the model; torch's DistributedDataParallel sums gradients at the last backward of an update
    fsdp   each rank holds a share of every layer; torch's FSDP2 gathers a layer when it runs

Both average over ranks, so the gradient of the log-probs is multiplied by the number of ranks (step.py): the denominators
are those of the whole update already. Left out: which rows a rank takes (batch.py, step.py), starting ranks (launch.py).
"""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from schemas.errors import Reported
from schemas.recipe import Policy
from trainer.batch import Batch
from trainer.model import PolicyLM, device_of, layers_of

LEFT_ALONE = 75  # exit code of a rank that ended because another one did
LAUNCHER = "DYPO_LAUNCHER"  # the process that started the ranks, by pid
LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe", "Socket closed")
PATIENCE = timedelta(hours=12)  # how long ranks wait for the leader, which computes reference log-probs alone


@dataclass(frozen=True)
class Team:
    """This process's place among `world`; `spread` says how they share the model."""

    rank: int = 0
    world: int = 1
    spread: str = "ddp"
    _wrapped: dict[int, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, model: PolicyLM) -> None:
        """Spreads the model over the ranks, in place. Before the optimizers are made."""
        if self.world == 1:
            return
        if self.spread == "fsdp":
            for layer in layers_of(model.lm):
                fully_shard(layer)
            fully_shard(model)
        else:
            self._wrapped[id(model)] = DistributedDataParallel(model)

    def run(self, model: PolicyLM, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's forward, as `PolicyLM.forward`; a collective when there are several ranks."""
        return self._wrapped.get(id(model), model)(batch)

    @contextmanager
    def sums_gradients(self, now: bool) -> Iterator[None]:
        """Around a forward and its backward: ddp talks at an update's last one only, fsdp at each."""
        wrapped = next(iter(self._wrapped.values()), None)
        with nullcontext() if now or wrapped is None else cast(DistributedDataParallel, wrapped).no_sync():
            yield

    def everyones(self, mine: Any) -> list[Any]:
        """What each rank has, in the order of ranks."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def leaders(self, mine: Any) -> Any:
        """What the leader has."""
        return self.everyones(mine)[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a round. A rank that only lost another one leaves without a word: who was lost is told by the launcher."""
        try:
            yield
        except (RuntimeError, dist.DistError) as e:
            if self.world > 1 and any(sign in str(e) for sign in LOST):
                raise Reported(LEFT_ALONE) from e
            raise


ALONE = Team()


def in_team() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_with_launcher() -> None:
    """From now on this rank ends when the process that started it does, even by kill -9: it works under that one's lock."""
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(LEFT_ALONE)

    threading.Thread(target=watch, daemon=True).start()


def assemble(spread: str, policy: Policy, go: bool) -> bool:
    """Joins, and tells every rank what the leader says: whether there is a round to train."""
    return join(spread, device_of(policy)).leaders(go)


def join(spread: str, device: str) -> Team:
    """The team that torchrun's environment names; ALONE without one. Waits for all of its ranks."""
    if not in_team():
        return ALONE
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Team(dist.get_rank(), dist.get_world_size(), spread)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on the CPU: a collective; any other as it is."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()
