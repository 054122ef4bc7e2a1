"""A checkpoint: a Hugging Face folder, with what the trainer needs to go on in its `trainer/` folder.

    config.json, *.safetensors           the model, whole, as it is held, by save_pretrained; with LoRA, the adapter merged in
    adapter/                             with LoRA: the adapter in peft's format
    bridge/                              with method bridge: the weights under the adapter, and their shadow
    tokenizer files, chat template, ...  copied byte for byte from the folder that the round began from
    trainer/tensors/*.safetensors        AdamW moments as OPTIMIZER/PARAMETER/NAME, and torch's RNG state: written by
                                         torch.distributed.checkpoint, each rank its share, read by any number of ranks
    trainer/state.json                   round, steps done, how the round ended, cursors

One idea: resuming is bitwise, so everything is stored exactly (the dtype it has, no pickle) and what can be computed again (the plan,
the learning rate) is not stored; cursors are there to be looked at. A round that begins from the checkpoint of the round
before takes the moments and leaves the rest. Left out: atomic publication, which is the sink's.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import PreTrainedModel

from schemas.errors import UserError
from trainer import adapter, bridge
from trainer.model import PolicyLM, quiet
from trainer.optim import Optimizers
from trainer.schedule import Cursor
from trainer.team import ALONE, Team, whole

VERSION = 1
TENSORS = Path("trainer") / "tensors"
RNG = "rng/torch"
COPIED = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates", "generation_config.json"),
)


@dataclass(frozen=True)
class TrainerState:
    """Where training stands. ended: why the round is over (RoundEnd.reason), or None while it goes on.

    before: steps really taken in the rounds before this one, which a round that ends early makes fewer than planned.
    """

    round: int
    steps: int
    ended: str | None
    cursor: Cursor
    before: int = 0
    version: int = VERSION


def save_checkpoint(
    folder: Path, model: PolicyLM, optimizers: Optimizers, state: TrainerState, *, start: Path, team: Team = ALONE
) -> None:
    """Fills an empty folder; every rank of a team calls it. `start` is where tokenizer files and the like are copied from."""
    lm = model.lm
    if not isinstance(lm, PreTrainedModel):
        raise TypeError(f"a checkpoint is a Hugging Face folder; {type(lm).__name__} has no save_pretrained")
    weights = _weights(lm, kept=team.leads)
    if team.leads:
        with quiet():
            adapter.save(lm, weights, folder) if adapter.of(lm) else lm.save_pretrained(folder, state_dict=weights)
        if model.shadow:
            bridge.save(model, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)  # the start's own, or none: it names the stop tokens
        for pattern in COPIED:
            for source in sorted(start.glob(pattern)):
                if source.is_dir():
                    shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(source, folder / source.name)
        (folder / TENSORS).mkdir(parents=True)
        (folder / "trainer" / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    team.wait()
    tensors = _moments(lm, optimizers) | {RNG: torch.get_rng_state()}
    with _plain_errors():
        writer = HuggingFaceStorageWriter(str(folder / TENSORS), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, no_dist=team.world == 1)


def _weights(lm: nn.Module, *, kept: bool) -> dict[str, Tensor]:
    """Every tensor of the model, whole; one that is there under two names (tied embeddings) stays one.

    A collective. Ranks that do not keep them hold one tensor at a time.
    """
    made: dict[int, Tensor] = {}
    named = lm.state_dict(keep_vars=True)
    for tensor in {id(tensor): tensor for tensor in named.values()}.values():
        gathered = whole(tensor)
        if kept:
            made[id(tensor)] = gathered
    return {name: made[id(tensor)] for name, tensor in named.items()} if kept else {}


def _moments(lm: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' state as it lies there: sharded like the parameters."""
    return {
        f"{which}/{name}/{key}": value
        for which, optimizer in optimizers.items()
        for name, parameter in lm.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint without its advice that one process is one process, and with its cause as the error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as e:
            raise next(iter(e.failures.values()))[0] from None


def load_state(folder: Path) -> TrainerState | None:
    """The trainer state of a model folder; None if it has none. UserError if it is of another version."""
    path = folder / "trainer" / "state.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.get("version") != VERSION:
        raise UserError(
            f"{path}: trainer state of version {found.get('version')}, expected {VERSION}; "
            "train the round again with --round, or go on with the dypo that wrote it"
        )
    return TrainerState(**{**found, "cursor": Cursor(**found["cursor"])})


def load_tensors(folder: Path, model: PolicyLM, optimizers: Optimizers, *, rng: bool, team: Team = ALONE) -> None:
    """Puts the stored moments into the optimizers, and with `rng` torch's RNG back where it was.

    An optimizer that the folder knows nothing of begins fresh. UserError if a moment does not fit its parameter.
    """
    path = folder / TENSORS
    reader = HuggingFaceStorageReader(str(path))
    stored = {key: list(meta.size) for key, meta in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    for which, optimizer in optimizers.items():
        for name, parameter in model.lm.named_parameters():
            if f"{which}/{name}/step" in stored and parameter.requires_grad:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),  # the fused kernel wants it there
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    tensors = _moments(model.lm, optimizers) | {RNG: torch.get_rng_state()}
    for key, tensor in tensors.items():
        if stored.get(key) != list(tensor.shape):
            raise UserError(
                f"{path}: {key} has shape {stored.get(key)}, expected {list(tensor.shape)}; the folder belongs to another model"
            )
    with _plain_errors():
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=team.world == 1)
    if rng:
        torch.set_rng_state(tensors[RNG])
