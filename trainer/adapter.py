"""LoRA through peft: attached to the base policy, saved in peft's format, and merged into whole weights for everybody else.

One idea: an adapter belongs to the run's base policy for the whole run. A checkpoint's own weights are the merged ones, so
engines, eval and exports need to know nothing; training goes on from `adapter/` over the base, never from merged weights.
Left out: peft's other adapters, and adapters that are themselves a starting policy.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from schemas.recipe import Lora

NAME = "default"
FOLDER = "adapter"
WITHIN = "base_model.model."  # where a model's own names begin in peft's files


def attach(lm: nn.Module, lora: Lora, folder: Path | None) -> None:
    """Puts an adapter on the model, new or that of a checkpoint, and freezes everything else.

    UserError without peft, or if the checkpoint's adapter is another one.
    """
    try:
        from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise UserError("train.lora and method bridge need peft: pip install 'dypo[lora]'") from None
    target = lora.target_modules
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=target, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    try:
        cast(Any, lm).add_adapter(config, adapter_name=NAME)
    except ValueError as e:  # peft's, for names that no layer has or layers that it cannot adapt
        raise UserError(f"train.lora.target_modules = {target!r}: {e}") from None
    head = cast(Any, lm).get_output_embeddings()
    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer) and (module is head or type(module.base_layer) is not nn.Linear):
            raise UserError(
                f"train.lora.target_modules = {target!r}: {name} is the output head, or no plain linear layer; expected linear layers "
                "of the decoder, which is what can be merged again. Leave it out"
            )
    if folder is None:
        return
    path = folder / FOLDER / "adapter_model.safetensors"
    stored = {key.removeprefix(WITHIN): value for key, value in load_file(path).items()}
    alpha = json.loads((folder / FOLDER / "adapter_config.json").read_text())["lora_alpha"]
    own = get_peft_model_state_dict(lm, adapter_name=NAME)
    other = sorted(
        key
        for key in own.keys() | stored.keys()
        if key not in own or key not in stored or own[key].shape != stored[key].shape
    )
    if other or alpha != lora.alpha:
        what = (
            f"{len(other)} tensors are missing, too many or of another shape, first {other[0]}"
            if other
            else f"alpha {alpha}"
        )
        raise UserError(
            f"{path}: not the adapter that train.lora describes, which has rank {lora.rank} and alpha {lora.alpha} ({what}); "
            "give the rank, alpha and target_modules that it was trained with: an adapter is for a whole run"
        )
    set_peft_model_state_dict(lm, stored, adapter_name=NAME)


def owns(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def of(lm: nn.Module) -> bool:
    """Whether an adapter is attached."""
    return bool(getattr(lm, "_hf_peft_config_loaded", False))


def save(lm: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """The merged model as an HF folder, and the adapter under `adapter/`. weights: the whole state of `lm`."""
    from peft import get_peft_model_state_dict

    inside = folder / FOLDER
    inside.mkdir()
    mine = get_peft_model_state_dict(lm, state_dict=weights, adapter_name=NAME)
    save_file({WITHIN + key: value.contiguous() for key, value in mine.items()}, inside / "adapter_model.safetensors")
    cast(Any, lm).peft_config[NAME].save_pretrained(str(inside))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(cast(Any, lm).config, dtype=torch.float32)
    cast(Any, empty).save_pretrained(folder, state_dict=_merged(lm, weights))


def _merged(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha / r) B A for each adapted layer, under the names of the model without an adapter."""
    from peft.tuners.lora import LoraLayer

    merged = dict(weights)
    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (merged.pop(f"{name}.{part}.{NAME}.weight") for part in ("lora_A", "lora_B"))
            merged[f"{name}.base_layer.weight"] = merged[f"{name}.base_layer.weight"] + module.scaling[NAME] * (b @ a)
    return {key.replace(".base_layer.", "."): value for key, value in merged.items()}
