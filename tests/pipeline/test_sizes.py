"""The arithmetic of `dypo plan`: slots from shards against a plain loop, memory against counting by hand and a real process."""

import json
import math
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from pipeline import memory as memory_of
from pipeline.context import Context, load
from pipeline.memory import Group, memory, read_model, trained_parameters
from pipeline.sizes import in_words, sizes
from pipeline.store import ask, sql
from schemas.recipe import Lora, Recipe
from schemas.tables import ARROW
from tests.bench.sizes import TINY, estimate, measured
from tests.tiny_runs import ROOT, write_recipe
from tests.trainer.tiny import shard_row

TINY_PARAMETERS = 19 * 64 + 64 + 2 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 192)  # embeddings, last norm, two layers


def shards(groups: int = 7, hard: int = 5) -> list[dict[str, Any]]:
    """Mid groups of 3 and Hard prompts with traces of two teachers, lengths 1 to 9; and another round, not to be counted."""
    rng = np.random.default_rng(1)
    rows = []
    for q in range(groups + hard):
        prompt = [1] * int(rng.integers(1, 6))
        for s in range(3):
            tokens = [2] * int(rng.integers(1, 10))
            if q < groups:
                rows.append(shard_row("rl", f"q{q}", s, prompt, tokens, group_size=3))
            elif s < 2 or q % 2:
                rows.append(shard_row("sft", f"q{q}", s, prompt, tokens, teacher="ab"[s % 2]))
    other = [{**row, "round": 0, "tokens": row["tokens"] * 3} for row in rows if row["route"] == "sft"]
    return [*other, *({**row, "round": 1} for row in rows)]


@pytest.mark.parametrize("visits", [1, 4, 100])
def test_slots_of_shards_are_those_of_a_plain_loop(visits: int) -> None:
    from trainer.batch import slots
    from trainer.rows import Shards

    rows = shards()
    con = duckdb.connect()
    con.register("shards", pa.Table.from_pylist(rows, ARROW["shards"]))
    got = {r["route"]: r for r in ask(con, sql("plan/slots"), round=1, visits=visits).to_pylist()}

    of_round = [row for row in rows if row["round"] == 1]
    read = Shards(pa.Table.from_pylist(of_round, ARROW["shards"]), None)
    most: dict[tuple[str, str], int] = {}
    mean: dict[tuple[str, str], float] = {}
    for route, prompt in sorted({(r["route"], r["prompt_id"]) for r in of_round}):
        mine = [r for r in of_round if r["prompt_id"] == prompt]
        size = {r["item_id"]: slots(read.rows([(route, r["item_id"])])) for r in mine}
        if route == "rl":
            most[route, prompt] = mean[route, prompt] = slots(read.rows([(route, r["item_id"]) for r in mine]))
        else:
            most[route, prompt] = max(size.values())
            teachers = {r["teacher"] for r in mine}
            mean[route, prompt] = float(
                np.mean([np.mean([size[r["item_id"]] for r in mine if r["teacher"] == t]) for t in teachers])
            )
    largest = sorted(most, key=lambda key: (-most[key], key[1]))[:visits]
    for route in ("rl", "sft"):
        keys = [key for key in most if key[0] == route]
        assert (got[route]["visits"], got[route]["prompts"]) == (len(keys), len({prompt for _, prompt in most}))
        assert got[route]["most"] == max(most[key] for key in keys)
        assert got[route]["slots"] == pytest.approx(np.mean([mean[key] for key in keys]))
        assert got[route]["largest"] == sum(most[key] for key in largest if key[0] == route)
        sequences = [len(r["prompt_tokens"]) + len(r["tokens"]) - 1 for r in of_round if r["route"] == route]
        assert got[route]["sequence"] == max(sequences)


def recipe(folder: Path, **changes: str) -> Context:
    return load(write_recipe(folder, **changes))


def test_before_any_shard_the_recipes_limits_bound_a_step(tmp_path: Path) -> None:
    s = sizes(recipe(tmp_path))
    assert (s.prompts_per_step, s.sequences_per_step, s.updates) == (6, 24, 12)
    assert (s.slots.round, s.slots.group_most, s.slots.step_most) == (None, 4 * 63, 6 * 4 * 63)
    assert (s.micro_batches, s.micro_batches_most, s.pieces_of_the_longest_group) == (None, 1, 1)
    assert s.micro_batch_slots == 6 * 4 * 63
    assert s.parameters == s.trained_parameters == TINY_PARAMETERS


@pytest.mark.parametrize(
    ("budget", "processes", "micro_batches", "pieces"), [(252, 1, 6, 1), (504, 1, 3, 1), (600, 2, 2, 1), (100, 1, 6, 3)]
)
def test_micro_batches_are_those_that_the_trainer_plans(
    tmp_path: Path, budget: int, processes: int, micro_batches: int, pieces: int
) -> None:
    from trainer.batch import plan_micro_batches

    how = f"checkpoint_every = 2\nmicro_batch_tokens = {budget}\nprocesses = {processes}"
    s = sizes(recipe(tmp_path, **{"checkpoint_every = 2": how}))
    assert (s.micro_batches_most, s.pieces_of_the_longest_group) == (micro_batches, pieces)
    assert len(plan_micro_batches([s.slots.group_most] * s.slots.visits, budget, processes)) == micro_batches
    words = {
        line[0]: " ".join(line[1:]) for line in in_words(s, recipe(tmp_path, **{"checkpoint_every = 2": how}).recipe)[0]
    }
    assert ("pieces" in words["longest group"]) == (pieces > 1)


def of_tiny(train: dict[str, Any] | None = None, dtype: str = "float32", group: Group | None = None) -> dict[str, int]:
    r = load(ROOT / "recipes" / "tiny.toml").recipe.model_dump(mode="json", exclude_none=True)
    r["train"] |= train or {}
    r["policy"] |= {"dtype": dtype, "device": "cpu"}
    return memory(read_model(TINY), Recipe.model_validate(r), 1000, group or Group(8, 10, 8))


def test_memory_of_weights_gradients_and_moments_is_counted_by_word() -> None:
    n = TINY_PARAMETERS
    assert list(of_tiny().values())[:3] == [4 * n, 4 * n, 8 * n]
    assert list(of_tiny(dtype="float64").values())[:3] == [8 * n, 8 * n, 16 * n]
    assert list(of_tiny({"processes": 4}).values())[:3] == [n, n, 2 * n]
    assert list(of_tiny({"processes": 4, "spread": "ddp"}).values())[:4] == [4 * n, 4 * n, 8 * n, 4 * n]
    queue = {"method": {"type": "dypo", "schedule": "queue", "sft_lr": 1e-5}}
    assert list(of_tiny(queue).values())[:3] == [4 * n, 4 * n, 16 * n]
    adapter = 3 * 2 * (4 * (64 + 64) + 3 * (64 + 192))
    assert trained_parameters(read_model(TINY), Lora(rank=3)) == adapter
    assert list(of_tiny({"lora": {"rank": 3}}).values())[:3] == [4 * (n + adapter), 4 * adapter, 8 * adapter]
    both = {"method": {"type": "bridge", "rank": 3}}
    trained = n + adapter  # the weights and their shadow have moments each, the adapter its own
    assert list(of_tiny(both).values())[:4] == [4 * trained, 4 * trained, 8 * (2 * n + adapter), 4 * n]
    only = Lora(rank=3, target_modules=["q_proj", "down_proj"])
    assert trained_parameters(read_model(TINY), only) == 3 * 2 * ((64 + 64) + (64 + 192))
    assert trained_parameters(read_model(TINY), Lora(rank=3, target_modules=r".*\.1\..*q_proj")) == 3 * (64 + 64)


def test_adapter_parameters_are_those_that_peft_makes() -> None:
    from schemas.recipe import Policy
    from trainer import adapter
    from trainer.model import load_model

    for lora in (
        Lora(rank=4),
        Lora(rank=2, target_modules=["v_proj", "up_proj"]),
        Lora(target_modules=r".*\.0\.mlp\..*_proj"),
    ):
        model = load_model(TINY, Policy(model=TINY, device="cpu"))
        adapter.attach(model.lm, lora, None)
        real = sum(p.numel() for p in model.lm.parameters() if p.requires_grad)
        assert trained_parameters(read_model(TINY), lora) == real


def test_activations_of_a_small_group_are_counted_tensor_by_tensor() -> None:
    h = a = 64
    layer = 4 * (
        2 * (h + h + h) + (4 * a + a) + 2 * 192
    )  # two norms with their outputs; q, k, v, out, its copy; gate and up
    assert of_tiny()["activations of all layers"] == 1000 * (2 * layer + 5 * 4 * h)
    recomputed = of_tiny({"gradient_checkpointing": True})
    assert recomputed["activations: each layer's input"] == 1000 * (2 * 4 * h + 5 * 4 * h)
    assert recomputed["one layer's activations, made again"] == 1000 * layer
    large = of_tiny(group=Group(100, 20, 8))["activations of all layers"]  # the prompt once, and a copy for each response
    copies = a * (4 * 100 + 8 * (3 * 120 + 20)) / 260
    assert large == pytest.approx(1000 * (2 * (layer + 4 * (copies - 4 * a)) + 5 * 4 * h))
    half = of_tiny(dtype="bfloat16")["activations of all layers"]
    assert half == 1000 * (2 * (4 * 4 * h + 2 * (5 * h + a + 2 * 192 + 4 * a)) + 5 * 4 * h)


def test_constants_of_the_trainer_are_the_trainers() -> None:
    from trainer.attention import WHOLE_BLOCK
    from trainer.vocabulary import TILE_BYTES

    assert (memory_of.WHOLE_BLOCK, memory_of.TILE_BYTES) == (WHOLE_BLOCK, TILE_BYTES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_what_a_real_update_takes(checkpointing: bool) -> None:
    what: dict[str, Any] = {"slots": 4096, "checkpointing": checkpointing}
    (_, guess), (_, held) = estimate(TINY, **what), measured(TINY, **what)
    assert 1 / 1.3 < guess / held < 1.3


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "there is no folder"),
        ({}, "does not give hidden_size"),
        ({"num_experts": 8}, "mixture of experts"),
        ("{", "cannot be read"),
    ],
)
def test_a_model_that_says_too_little_is_named_and_the_rest_is_told(tmp_path: Path, config: Any, says: str) -> None:
    model = tmp_path / "model"
    if config is not None:
        model.mkdir()
        given = json.loads((TINY / "config.json").read_text()) | config if config and config != "{" else config
        (model / "config.json").write_text(given if isinstance(given, str) else json.dumps(given))
    ctx = recipe(tmp_path, **{f"{ROOT}/data/tiny_policy": str(model)})
    s = sizes(ctx)
    assert s.memory is None
    assert says in str(s.why_no_memory)
    assert s.as_json()["updates"] == 12
    assert says in str(in_words(s, ctx.recipe)[1])


def test_a_queue_may_hold_more_than_a_step(tmp_path: Path) -> None:
    queue = 'method = { type = "dypo", preset = "official" }'
    s = sizes(recipe(tmp_path, **{'method = { type = "dypo", lr = 1e-3 }': queue}))
    assert s.micro_batch_slots == (8 + 6) * 4 * 63
    assert math.isclose(s.lr, 5e-7)
