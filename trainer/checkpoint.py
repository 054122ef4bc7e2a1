"""A checkpoint: a Hugging Face folder, with what the trainer needs to go on in its `trainer/` folder.

    config.json, *.safetensors           the model, float32, by save_pretrained
    tokenizer files, chat template, ...  copied byte for byte from the folder that the round began from
    trainer/tensors.safetensors          AdamW moments as OPTIMIZER/PARAMETER/NAME, and torch's RNG state
    trainer/state.json                   round, steps done, how the round ended, cursors

One idea: resuming is bitwise, so everything is stored exactly (float32, no pickle) and what can be computed again (the plan,
the learning rate) is not stored; cursors are there to be looked at. A round that begins from the checkpoint of the round
before takes the moments and leaves the rest. Left out: atomic publication, which is the sink's.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from schemas.errors import UserError
from trainer.model import quiet
from trainer.optim import Optimizers
from trainer.schedule import Cursor

VERSION = 1
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


def save_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers, state: TrainerState, *, start: Path) -> None:
    """Fills an empty folder. `start` is where tokenizer files and the like are copied from."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"a checkpoint is a Hugging Face folder; {type(model).__name__} has no save_pretrained")
    with quiet():
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the start's own, or none: it names the stop tokens
    for pattern in COPIED:
        for source in sorted(start.glob(pattern)):
            if source.is_dir():
                shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, folder / source.name)
    inside = folder / "trainer"
    inside.mkdir()
    tensors = {"rng/torch": torch.get_rng_state()}
    for which, optimizer in optimizers.items():
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{which}/{name}/{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, inside / "tensors.safetensors")
    (inside / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")


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


def load_tensors(folder: Path, model: nn.Module, optimizers: Optimizers, *, rng: bool) -> None:
    """Puts the stored moments into the optimizers, and with `rng` torch's RNG back where it was.

    An optimizer that the folder knows nothing of begins fresh. UserError if a moment does not fit its parameter.
    """
    path = folder / "trainer" / "tensors.safetensors"
    tensors = load_file(path)
    for which, optimizer in optimizers.items():
        for name, parameter in model.named_parameters():
            prefix = f"{which}/{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if any(key != "step" and value.shape != parameter.shape for key, value in state.items()):
                raise UserError(f"{path}: the moments of {name} do not have its shape; the folder belongs to another model")
            if state:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
    if rng:
        torch.set_rng_state(tensors["rng/torch"])
