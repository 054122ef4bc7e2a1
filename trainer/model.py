"""The policy as the trainer runs it: a Hugging Face causal LM that gives log-probs of response tokens, and how it is loaded.

    logp_t = log softmax(logits_t / temperature)[token_t], over the whole vocabulary, in float32 at least

One idea: `PolicyLM` is asked for log-probs and nothing else, so that how rows are laid out is its own affair. Packed: one
row of blocks (batch.py), the backbone's hidden states, and the head only where a token is predicted. Not packed: one
sequence a row, padded, and the model's own logits, whatever the model does. No model is packed without a probe.
Weights are float32 masters (an AdamW step of 1e-6 vanishes in bfloat16); policy.dtype bfloat16 means autocast around the
forward. Dropout is off: it would make the ratio to the stored log-probs noise.
Left out: adapters (adapter.py), several processes (team.py).
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from schemas.errors import UserError
from schemas.recipe import Policy
from trainer import attention
from trainer.batch import Batch, pack
from trainer.gated_mlp import spare_products
from trainer.vocabulary import token_logps

PROBE_TOLERANCE = 1e-3  # nats; another mask is off by 0.1 and more, float32 rounding in deep models by 1e-4


class PolicyLM(nn.Module):
    """A causal LM read at its response tokens. `packed` says how; `why_not` is what the probe found when it is not.

    shadow: a second copy of its base weights by name, where the method trains one (bridge.py).
    """

    def __init__(self, lm: nn.Module, *, packed: bool = False, autocast: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.packed, self.autocast = packed, autocast
        self.why_not: str | None = None
        self.shadow: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logps_BT, entropy_BT) of the response tokens; 0 where batch.mask_BT is False. Entropy carries no gradient.

        In nats, at each row's temperature; float32, or float64 for a float64 model.
        """
        with torch.autocast(batch.input_ids_S.device.type, torch.bfloat16, enabled=self.autocast):
            logps_N, entropy_N = self._packed(batch) if self.packed else self._one_by_one(batch)
        return batch.by_row(logps_N), batch.by_row(entropy_N)

    def _packed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        lm = cast(Any, self.lm)
        out = lm.base_model(
            input_ids=batch.input_ids_S.unsqueeze(0),
            position_ids=batch.positions_S.unsqueeze(0),
            use_cache=False,
            blocks=batch.blocks,
        )
        head = lm.get_output_embeddings()
        hidden_UH = out.last_hidden_state[0, batch.slot_U]
        return token_logps(
            hidden_UH, head.weight, getattr(head, "bias", None), batch.at_N, batch.target_N, batch.temperature_U
        )

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One block a row, padded on the right, where causal attention cannot see it."""
        lengths = [block.stop - block.start for block in batch.blocks]
        ids_BL = pad_sequence(list(batch.input_ids_S.split(lengths)), batch_first=True)
        starts_B = torch.tensor([block.start for block in batch.blocks], device=ids_BL.device)
        row_U = torch.searchsorted(starts_B, batch.slot_U, right=True) - 1
        wanted_P, place_U = (batch.slot_U - starts_B[row_U]).unique(return_inverse=True)
        if "logits_to_keep" in inspect.signature(self.lm.forward).parameters:
            logits_BPV = self.lm(input_ids=ids_BL, use_cache=False, logits_to_keep=wanted_P).logits
        else:
            logits_BPV = self.lm(input_ids=ids_BL, use_cache=False).logits[:, wanted_P]
        logits_UV = logits_BPV[row_U, place_U]
        logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32))
        logps_UV = (logits_UV / batch.temperature_U.to(logits_UV.dtype).unsqueeze(-1)).log_softmax(-1)
        with torch.no_grad():
            entropy_U = -(logps_UV.exp() * logps_UV).sum(-1)
        return logps_UV[batch.at_N, batch.target_N], entropy_U[batch.at_N]


def load_model(folder: Path, policy: Policy) -> PolicyLM:
    """The causal LM of an HF folder, on the policy's device; sets torch's threads if the policy names a number.

    UserError if there is no such folder. Warns when the model cannot be packed, with what the probe found.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder (weights as safetensors)")
    if policy.threads is not None:
        torch.set_num_threads(policy.threads)
    lm = read_lm(folder, policy)
    _refuse_stretching(lm, folder)
    lm = lm.to(device_of(policy)).eval()
    if policy.dtype == "float64":
        lm.double()  # buffers too
    for module in lm.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it would drop the pad token's gradient, and many policies pad with a token they use
    spare_products(lm)
    model = packed_if_possible(lm)
    model.autocast = policy.dtype == "bfloat16"
    if model.why_not:
        warnings.warn(
            f"{folder}: rows are not packed, each response runs with a prompt of its own: {model.why_not}", stacklevel=2
        )
    return model


def read_lm(folder: Path, policy: Policy) -> nn.Module:
    """The model of an HF folder as transformers reads it, on the CPU, its weights float32 masters (or float64)."""
    dtype = torch.float64 if policy.dtype == "float64" else torch.float32
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )


def _refuse_stretching(lm: Any, folder: Path) -> None:
    """UserError for rotary embeddings whose frequencies follow the longest sequence of a forward.

    A row's log-probs would then depend on its neighbours, packed or padded, and no probe of short rows sees it.
    """
    rope = getattr(lm.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)} & {
        "dynamic",
        "longrope",
    }
    if kinds:
        raise UserError(
            f"{folder}: rope_type {', '.join(sorted(kinds))} chooses its frequencies by the longest sequence in a forward, so a "
            "response's log-probs would depend on what runs beside it. Set a fixed rope_type (default, linear, yarn, llama3) in config.json"
        )


# ---------------------------------------------------------------- the probe
def packed_if_possible(lm: nn.Module) -> PolicyLM:
    """Packed, if the log-probs of a packed probe are those of its sequences one by one; else not, with `why_not` set."""
    model = PolicyLM(lm)
    model.why_not = _unlike(lm)
    if model.why_not is not None:
        return model
    own = cast(Any, lm).config._attn_implementation
    rows = _probe_rows(cast(Any, lm).config.get_text_config())
    with torch.no_grad():
        one_by_one = [model(pack([row], model.device))[0][0] for row in rows]
        model.packed = True
        cast(Any, lm).set_attn_implementation(attention.NAME)
        try:
            packed_BT, _ = model(pack(rows, model.device))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NotImplementedError) as e:
            model.why_not = f"it does not run on packed rows ({e})"
        else:
            pairs = zip(one_by_one, packed_BT, strict=True)
            worst = max((one_T - packed_T[: len(one_T)]).abs().max().item() for one_T, packed_T in pairs)
            if not worst <= PROBE_TOLERANCE:
                model.why_not = f"its log-probs on packed rows differ by {worst:.2g} from those of one sequence at a time"
    if model.why_not is not None:
        model.packed = False
        cast(Any, lm).set_attn_implementation(own)
    return model


def _unlike(lm: nn.Module) -> str | None:
    """What is known about a model without running it, that rules packing out."""
    if not hasattr(lm, "set_attn_implementation") or not hasattr(lm, "get_output_embeddings"):
        return f"{type(lm).__name__} is no model of transformers"
    config = cast(Any, lm).config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    return None


def _probe_rows(config: Any) -> list[Any]:
    """Three responses to one prompt, one of them of one token; then two to a prompt that outgrows a sliding window."""
    window = getattr(config, "sliding_window", None) or 0
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, config.vocab_size, n)

    first, second = ids(5), ids(window + 8)
    made = [(first, ids(9)), (first, ids(1)), (first, ids(4)), (second, ids(7)), (second, ids(3))]
    return [SimpleNamespace(prompt_tokens=p, tokens=t, temperature=0.7) for p, t in made]


# ---------------------------------------------------------------- small things of models
def recompute_activations(lm: nn.Module) -> None:
    """Gradient checkpointing: each decoder layer keeps its input only and runs again in the backward pass.

    Not transformers' own, which does nothing in eval mode, the mode that keeps dropout off.
    """
    for layer in layers_of(lm):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def layers_of(lm: nn.Module) -> list[nn.Module]:
    """The decoder layers. UserError for a model that does not say what they are."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(lm).__name__} does not say what its layers are, which train.gradient_checkpointing and train.spread = "
            "'fsdp' need to know; leave them out"
        )
    return layers


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers inside: progress is told by the sink."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def device_of(policy: Policy) -> str:
    """cpu or cuda; `auto` takes cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if policy.device == "auto" else policy.device
