"""What trainer tests are made of: a tiny random Llama, shards made by hand, and a Sink over a folder."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.methods import Method
from schemas.recipe import Policy, Train
from schemas.tables import ARROW
from trainer.job import TrainJob
from trainer.model import PolicyLM, packed_if_possible
from trainer.objective import Counts, mixture
from trainer.rows import Row
from trainer.step import Observed, accumulate

VOCAB, EOS = 32, 1


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


class ExactLM(torch.nn.Module):
    """A causal model that is float64 throughout. transformers' Llama computes its norms and rotary angles in float32
    whatever its weights are, so with it two float64 gradients agree to 1e-6 and no better."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, 16, dtype=torch.float64)
        self.mix = torch.nn.Linear(16, 16, dtype=torch.float64)
        self.head = torch.nn.Linear(16, VOCAB, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        seen_BLH = torch.tanh(self.mix(self.embedding(input_ids))).cumsum(1)
        return SimpleNamespace(logits=self.head(torch.sin(seen_BLH)))


def exact_llama() -> LlamaForCausalLM:
    """tiny_llama in float64 throughout."""
    return exact_norms(tiny_llama().double())


def exact_norms(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A float64 Llama with norms that do not go through float32, in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(module.weight)
            model.set_submodule(name, norm)
    return model


def policy_lm(make: Callable[[], torch.nn.Module] = exact_llama) -> PolicyLM:
    """A model as the trainer runs it; ExactLM sums over what it has seen, so it cannot be packed, and a Llama can."""
    model = packed_if_possible(make())
    assert model.packed == (not isinstance(model.lm, ExactLM)), model.why_not
    return model


def shard_row(
    route: str, prompt: str, sample: int, prompt_tokens: Sequence[int], tokens: Sequence[int], **more: object
) -> dict:
    """One row of shards, sensible where nothing is said."""
    sft = route == "sft"
    row = {
        "round": 0,
        "source_round": 0,
        "route": route,
        "prompt_id": prompt,
        "item_id": f"{prompt}-{route}-{more.get('teacher', '')}-{sample}",
        "sample": sample,
        "teacher": "t0" if sft else None,
        "policy": "p",
        "temperature": 1.0,
        "prompt_tokens": list(prompt_tokens),
        "tokens": list(tokens),
        "old_logprobs": None if sft else [-2.0] * len(tokens),
        "finish_reason": "stop",
        "reward": 1.0,
        "correct": True,
        "advantage": 0.0,
        "group_size": 1,
        "w_sft": 1.0 if sft else 0.0,
        "w_grpo": 0.0 if sft else 1.0,
        "w_gal": 0.0 if sft else 1.0,
    }
    return row | more


def tokens_of(rng: np.random.Generator, low: int, high: int) -> list[int]:
    """Random ids (3 and up) ending in EOS, low to high long."""
    length = int(rng.integers(low, high + 1))
    return [*rng.integers(3, VOCAB, length - 1).tolist(), EOS]


def make_shards(
    *, hard: int = 4, mid: int = 4, k: int = 4, teachers: int = 2, traces: int = 2, seed: int = 0, temperature: float = 0.7
) -> pa.Table:
    """Hard prompts h0.. with traces of each teacher, Mid groups m0.. with 1 to k - 1 right answers."""
    rng = np.random.default_rng(seed)
    rows = []
    for h in range(hard):
        prompt = rng.integers(3, VOCAB, int(rng.integers(2, 7))).tolist()
        for t in range(teachers):
            rows += [shard_row("sft", f"h{h}", s, prompt, tokens_of(rng, 2, 12), teacher=f"t{t}") for s in range(traces)]
    for m in range(mid):
        prompt = rng.integers(3, VOCAB, int(rng.integers(2, 7))).tolist()
        correct = [i <= m % (k - 1) for i in range(k)]
        rewards = np.array(correct, dtype=float)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for s in range(k):
            tokens = tokens_of(rng, 1, 9)
            rows.append(
                shard_row(
                    "rl",
                    f"m{m}",
                    s,
                    prompt,
                    tokens,
                    temperature=temperature,
                    old_logprobs=(-3.5 + 0.3 * rng.standard_normal(len(tokens))).tolist(),
                    reward=rewards[s],
                    correct=correct[s],
                    advantage=advantages[s],
                    group_size=k,
                    finish_reason="length" if s == 0 else "stop",
                )
            )
    return pa.Table.from_pylist(rows, ARROW["shards"])


def shaped(shards: pa.Table, seed: int = 9) -> pa.Table:
    """The same with what real rollouts have and make_shards has not: rewards that disagree with `correct` (and advantages
    that follow the rewards), rollouts of several ages."""
    rng = np.random.default_rng(seed)
    rows = shards.to_pylist()
    for prompt in dict.fromkeys(row["prompt_id"] for row in rows if row["route"] == "rl"):
        group = [row for row in rows if row["route"] == "rl" and row["prompt_id"] == prompt]
        rewards = rng.uniform(-1, 1, len(group))
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for row, reward, advantage in zip(group, rewards.tolist(), advantages.tolist(), strict=True):
            row |= {"reward": reward, "advantage": advantage, "round": 2, "source_round": int(rng.integers(0, 3))}
    rl = [row for row in rows if row["route"] == "rl"]
    kinds = {(row["correct"], row["reward"] > 0, row["advantage"] > 0) for row in rl}
    assert {(c, r) for c, r, _ in kinds} == {(c, a) for c, _, a in kinds} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    } or not rl
    return pa.Table.from_pylist(rows, ARROW["shards"])


def make_ref(shards: pa.Table, seed: int = 5, role: str = "ref") -> pa.Table:
    """Log-probs of the rl rows under another policy (role ref), or of the trainer's own (role old), near the sampler's."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "round": 0,
            "role": role,
            "item_id": row["item_id"],
            "model": "base",
            "temperature": row["temperature"],
            "logprobs": (np.array(row["old_logprobs"]) + 0.2 * rng.standard_normal(len(row["tokens"]))).tolist(),
        }
        for row in shards.to_pylist()
        if row["route"] == "rl"
    ]
    return pa.Table.from_pylist(rows, ARROW["logprobs"])


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint of one process keeps beside the model: moments and RNG state."""
    (path,) = (folder / "trainer" / "tensors").glob("*.safetensors")
    return load_file(path)


def make_old(shards: pa.Table) -> pa.Table:
    return make_ref(shards, seed=6, role="old")


class Killed(RuntimeError):
    """What the test sink raises where a kill would come."""


class FolderSink:
    """A Sink over a folder. `die` names the call, as (method, nth), before whose publication it raises Killed."""

    def __init__(self, folder: Path, die: tuple[str, int] | None = None) -> None:
        self.folder, self.die = folder, die
        self.calls: dict[str, int] = {}
        self.notes: list[tuple[int, int, str]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def _called(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1
        if self.die == (method, self.calls[method]):
            raise Killed(f"{method} {self.calls[method]}")

    def write(self, table: str, rows: pa.Table, part: str) -> None:
        self._called("write")
        torch.rand(1)  # stands for whatever draws from torch's generator during a round: its state has to be resumed
        final = self.folder / table / f"part-{part}.parquet"
        final.parent.mkdir(exist_ok=True)
        assert not final.exists(), f"{final.name} is written twice"
        pq.write_table(rows.cast(ARROW[table]), final.with_suffix(".tmp"))
        final.with_suffix(".tmp").rename(final)

    def cut(self, table: str, step: int) -> None:
        self._called("cut")
        for path in sorted((self.folder / table).glob("*.parquet")):
            rows = pq.read_table(path)
            kept = rows.filter(pc.field("step") < step)
            if len(kept) == 0:
                path.unlink()
            elif len(kept) < len(rows):
                pq.write_table(kept, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)

    def checkpoints(self) -> dict[int, Path]:
        return {int(p.name.removeprefix("step=")): p for p in self.folder.glob("step=*")}

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        temporary = self.folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        self._called("checkpoint")
        return temporary.rename(self.folder / f"step={step}")

    def progress(self, done: int, total: int, note: str) -> None:
        self.notes.append((done, total, note))
        self._called("progress")

    def rows(self, table: str) -> list[dict]:
        """All rows, sorted by key."""
        parts = sorted((self.folder / table).glob("*.parquet"))
        rows = [row for path in parts for row in pq.read_table(path).to_pylist()]
        return sorted(rows, key=lambda r: (r["step"], r.get("position", 0), r.get("name", "")))


def make_train(method: dict | None = None, **more: object) -> Train:
    """Training settings for tests: a rate that moves weights, and checkpoints every second step. Made-up old log-probs pass."""
    settings = {"steps": 6, "prompts_per_step": 4, "micro_batch_tokens": 60, "checkpoint_every": 2}
    settings |= {"max_logprob_difference": 100.0}
    method = {"type": "dypo", "lr": 1e-2} | (method or {})
    optimizer = {"warmup_steps": 2, "decay": "cosine"}
    return Train.model_validate(settings | {"method": method, "optimizer": optimizer} | more)


def make_job(
    start: Path, sink: FolderSink, *, shards: pa.Table | None = None, train: Train | None = None, **more: object
) -> TrainJob:
    shards = make_shards() if shards is None else shards
    fields: dict = {
        "round": 0,
        "rounds": 2,
        "seed": 3,
        "train": train or make_train(),
        "policy": Policy(model=start, device="cpu"),
        "start": start,
        "shards": shards,
        "ref": make_ref(shards),
        "old": make_old(shards),
        "graded": {"easy": 2, "mid": 4, "hard": 4},
        "sink": sink,
    }
    return TrainJob(**(fields | more))


def accumulate_as(
    model: PolicyLM, units: list[list[Row]], counts: Counts, method: Method, *, easy_scale: float = 1.0, **more: Any
) -> Observed:
    """`accumulate` with the loss and the mixture of a method, at the first step."""
    mix = mixture(method.weights(0), method.loss, counts, easy_scale=easy_scale)
    return accumulate(model, units, counts, method.loss, mix, **more)
