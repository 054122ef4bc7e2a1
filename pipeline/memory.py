"""How much memory one process of training takes, from a model's headers and the recipe. Nothing is loaded, torch neither.

    state      weights, gradients and AdamW moments of what is trained; under fsdp each process has its share
    activations   what a layer keeps of each token slot for its backward pass (`_kept`), times slots and layers
    beside them   what comes and goes: the backward of one layer, tiles of the vocabulary, casts, what fsdp gathers

One idea: what lives at once can be counted, tensor by tensor, for the layer that nearly all policies have (Llama's in
transformers: RMSNorm, grouped queries, gated MLP). docs/performance.md has estimates beside measured figures; fsdp, ddp and
CUDA were not measured. Left out: Python and torch themselves (0.4 GB on a CPU), freed memory that an allocator keeps,
writing a checkpoint, other kinds of layer.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import UserError
from schemas.recipe import Lora, Recipe

TILE_BYTES = 32 << 20  # trainer.vocabulary.TILE_BYTES
WHOLE_BLOCK = 256  # trainer.attention.WHOLE_BLOCK
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Group:
    """A Mid prompt as slots, on average: `responses` of `response` slots after a prompt of `prompt`."""

    prompt: float
    response: float
    responses: int


@dataclass(frozen=True)
class Model:
    """A policy's folder in numbers. shapes: parameter name -> shape, tied ones once."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def in_layers(self) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes.items() if _in_a_layer(name))

    @property
    def tied(self) -> bool:
        return not any(name.endswith("lm_head.weight") for name in self.shapes)

    @property
    def normed_heads(self) -> bool:
        """Whether queries and keys have a norm of their own (Qwen3)."""
        return any(name.endswith("q_norm.weight") for name in self.shapes)


# ---------------------------------------------------------------- the model
def model_or_why(folder: Path) -> tuple[Model | None, str | None]:
    if not folder.is_dir():
        return None, f"there is no folder {folder}"
    try:
        return read_model(folder), None
    except UserError as e:
        return None, str(e)


def read_model(folder: Path) -> Model:
    """From config.json and the headers of the safetensors files. UserError if they do not say enough."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    config = config.get("text_config") or config
    lacks = [key for key in WIDTHS if not isinstance(config.get(key), int)]
    if lacks:
        raise UserError(f"{path} does not give {', '.join(lacks)}")
    if any("experts" in key for key in config):
        raise UserError(f"{path}: what a mixture of experts keeps is not known here")
    heads = config["num_attention_heads"]
    return Model(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        shapes=_shapes(folder),
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None
    if not shapes:
        raise UserError(f"{folder} has no *.safetensors")
    return shapes


def _in_a_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None


def trained_parameters(model: Model, lora: Lora | None) -> int:
    """Parameters with a gradient: all, or the adapter's r * (in + out) for each linear layer that it is put on."""
    if lora is None:
        return model.parameters
    return sum(lora.rank * sum(shape) for shape in _adapted(model, lora))


def _adapted(model: Model, lora: Lora) -> list[tuple[int, ...]]:
    """The shapes of the weights that peft would adapt."""
    target = lora.target_modules

    def chosen(name: str) -> bool:
        if target == "all-linear":
            return _in_a_layer(name)
        if isinstance(target, str):
            return re.fullmatch(target, name) is not None
        return any(name == t or name.endswith(f".{t}") for t in target)

    weights = {
        name.removesuffix(".weight"): s for name, s in model.shapes.items() if name.endswith(".weight") and len(s) == 2
    }
    return [shape for name, shape in weights.items() if chosen(name)]


# ---------------------------------------------------------------- memory
def memory(model: Model, recipe: Recipe, slots: int, group: Group) -> dict[str, int]:
    """Bytes by what holds them, in one process that runs a micro-batch of `slots` slots made of groups like `group`."""
    t, dtype = recipe.train, recipe.policy.dtype
    word = 8 if dtype == "float64" else 4
    share = t.processes if t.spread == "fsdp" else 1
    adapter = trained_parameters(model, t.adapter) if t.adapter else 0
    trained = adapter + (0 if t.lora else model.parameters)
    whole = model.parameters + adapter
    optimized = len(t.method.rates) * trained
    if "adapter" in t.method.rates:  # method bridge: one has the adapter, the others the rest
        optimized = adapter + (len(t.method.rates) - 1) * model.parameters
    rows: dict[str, float] = {
        "weights": word * whole / share,
        "gradients": word * trained / share,
        "AdamW moments": 2 * word * optimized / share,
    }
    if "shadow" in t.method.rates:
        rows["the shadow of the weights"] = word * model.parameters
    if t.processes > 1 and t.spread == "ddp":
        rows["buckets that ddp sums gradients in"] = word * trained
    if t.processes > 1 and t.spread == "fsdp":
        layer = model.in_layers / model.layers
        gathered = model.parameters - model.in_layers + 2 * layer
        rows["weights and gradients gathered by fsdp"] = word * gathered * (1 if t.lora else 2)
    kept = _kept(model, recipe, group) * slots
    cast = 2 * model.in_layers if dtype == "bfloat16" else 0  # autocast's copies, which the backward pass reads
    ends = 5 * word * model.hidden * slots  # the last norm, and the rows that predict, with their gradient
    tile = word * min(TILE_BYTES // 4, slots * model.vocabulary)
    head = 0 if t.lora else word * model.vocabulary * model.hidden
    layer_backward = (2 if dtype == "bfloat16" else word) * 5 * model.intermediate * slots
    if t.gradient_checkpointing:
        inputs = word * model.hidden * slots * model.layers
        rows["activations: each layer's input"] = inputs + ends
        rows["one layer's activations, made again"] = max(kept + cast / model.layers, cast)
    else:
        rows["activations of all layers"] = model.layers * kept + ends
        if cast:
            rows["weights cast to bfloat16"] = cast
    if model.tied:
        rows["gradient of the head, until the embeddings' joins it"] = head
        rows["backward of one layer, or a vocabulary tile"] = max(layer_backward, 2 * tile)
    else:
        rows["backward of one layer, or of the head"] = max(layer_backward, 2 * tile + head)
    return {name: round(value) for name, value in rows.items()}


def _kept(model: Model, recipe: Recipe, group: Group) -> float:
    """Bytes that one layer keeps of one slot for its backward pass. H hidden, I intermediate, A heads x head width:

    norms       2 x (input H, normalised H: only where the norm's weight is trained)
    linear      inputs: H for q, k, v; A for o; H for gate, up. Under autocast each has a bfloat16 copy of its own
    attention   `_attention` elements;  with norms of queries and keys 2 (A + K) more
    gated MLP   gate I, up I; the activation and down's input are made again (trainer/gated_mlp.py)
    """
    h, i = model.hidden, model.intermediate
    a, k = model.heads * model.head, model.key_heads * model.head
    norms = 2 * h if recipe.train.lora else 4 * h
    extra = 2 * (a + k) if model.normed_heads else 0
    attention = _attention(a, k, group, on_cuda(recipe))
    if recipe.policy.dtype == "bfloat16":
        return 4 * (norms + extra) + 2 * (5 * h + a + 2 * i + attention)
    word = 8 if recipe.policy.dtype == "float64" else 4
    return word * (norms + extra + 2 * h + a + 2 * i + attention)


def _attention(a: int, k: int, group: Group, cuda: bool) -> float:
    """Elements of queries, keys, values and outputs that are kept of one slot, averaged over a group (trainer/attention.py).

    On a CPU keys are repeated to the number of heads, and the prompt of a large group and each of its responses has copies of its own.
    """
    if cuda:
        return 2 * a + 2 * k
    block = group.prompt + group.responses * group.response
    if group.responses == 1 or block <= WHOLE_BLOCK:
        return 4 * a
    row = group.prompt + group.response
    out = group.response if group.response < group.prompt else row
    return a * (4 * group.prompt + group.responses * (3 * row + out)) / block


def on_cuda(recipe: Recipe) -> bool:
    """Whether training would run on CUDA, as far as can be told without torch."""
    device = recipe.policy.device
    return device == "cuda" or (device == "auto" and Path("/proc/driver/nvidia").exists())
