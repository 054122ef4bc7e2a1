"""Shard rows as the trainer uses them: looked up by item id, checked once, stored log-probs joined by role.

One idea: the Arrow table stays where it is; only the rows of the step at hand become Python objects. All checks run
before the model is loaded and name the row, what was expected and the way out.
Left out: which rows a step takes (schedule.py), and tensors (batch.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import UserError

Key = tuple[str, str]  # (route, item_id)


@dataclass(frozen=True)
class Row:
    """One sequence. `ref_logps` is None unless the method reads a reference; of sft rows all three log-probs are.

    old_logps: what ratios divide by; the sampler's own (`sampler_logps`), or rows of role old where the method reads them.
    masked: the row counts in every denominator and gives no gradient. by_reward: GAL's pairs compare rewards.
    group_size: members of the row's group; 1 for a trace that is in none. teacher_logps: of the policy to distill from.
    """

    item_id: str
    prompt_id: str
    route: str
    teacher: str | None
    age: int
    temperature: float
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    old_logps: np.ndarray | None
    ref_logps: np.ndarray | None
    finish_reason: str
    reward: float
    correct: bool
    advantage: float
    w_sft: float
    w_grpo: float
    w_gal: float
    group_size: int = 1
    sampler_logps: np.ndarray | None = None
    teacher_logps: np.ndarray | None = None
    masked: bool = False
    by_reward: bool = False

    @property
    def member(self) -> bool:
        """Whether it is a trace that is a member of its prompt's group."""
        return self.route == "sft" and self.group_size > 1

    @property
    def rating(self) -> float:
        """What GAL's pairs compare: 1 for correct, 0 for not, or the reward; NaN: in no pair."""
        if self.masked:
            return math.nan
        return self.reward if self.by_reward else float(self.correct)


class Shards:
    """A round's shard table, and the stored log-probs of the roles that the method reads (None: it does not).

    mask_truncated: rollouts that were cut at max_tokens are `masked`. pairs: the method's gal.pairs. partial: groups need not be whole,
    for a forward that looks at each row by itself.
    """

    def __init__(
        self,
        shards: pa.Table,
        ref: pa.Table | None = None,
        old: pa.Table | None = None,
        teacher: pa.Table | None = None,
        *,
        mask_truncated: bool = False,
        pairs: str = "correct",
        partial: bool = False,
    ) -> None:
        self.table = shards.combine_chunks()
        self._at: dict[Key, int] = {}
        for at, key in enumerate(zip(*_columns(shards, "route", "item_id"), strict=True)):
            if self._at.setdefault(key, at) != at:
                raise UserError(f"shards: item {key[1]} of route {key[0]} is there twice; grade the round again")
        self._mask_truncated = mask_truncated
        self._by_reward = pairs == "reward"
        given = {"ref": ref, "old": old, "teacher": teacher}
        self._roles = {role: t.combine_chunks() for role, t in given.items() if t is not None}
        self._role_at = {
            role: {item: at for at, item in enumerate(t["item_id"].to_pylist())} for role, t in self._roles.items()
        }
        _check(self.table, partial)
        for role in self._roles:
            self._check_role(role)

    def rows(self, keys: Iterable[Key]) -> list[Row]:
        """The rows of these keys, in this order."""
        return [self._row(self._at[key]) for key in keys]

    def _row(self, at: int) -> Row:
        get = {name: self.table[name][at] for name in _NEEDED}
        rl = get["route"].as_py() == "rl"
        item = get["item_id"].as_py()
        stored = {
            role: _numbers(t["logprobs"][self._role_at[role][item]], np.float32) for role, t in self._roles.items() if rl
        }
        sampler = _numbers(get["old_logprobs"], np.float32) if rl else None
        return Row(
            item_id=item,
            prompt_id=get["prompt_id"].as_py(),
            route=get["route"].as_py(),
            teacher=get["teacher"].as_py(),
            age=get["round"].as_py() - get["source_round"].as_py(),
            temperature=get["temperature"].as_py() if rl else 1.0,
            prompt_tokens=_numbers(get["prompt_tokens"], np.int64),
            tokens=_numbers(get["tokens"], np.int64),
            old_logps=stored.get("old", sampler),
            ref_logps=stored.get("ref"),
            teacher_logps=stored.get("teacher"),
            finish_reason=get["finish_reason"].as_py(),
            reward=get["reward"].as_py(),
            correct=get["correct"].as_py(),
            advantage=get["advantage"].as_py(),
            w_sft=get["w_sft"].as_py(),
            w_grpo=get["w_grpo"].as_py(),
            w_gal=get["w_gal"].as_py(),
            group_size=get["group_size"].as_py(),
            sampler_logps=sampler,
            masked=rl and self._mask_truncated and get["finish_reason"].as_py() == "length",
            by_reward=self._by_reward,
        )

    def _check_role(self, role: str) -> None:
        """Every rl row has its log-probs of this role: one a token, at the row's temperature."""
        table, where = self._roles[role], self._role_at[role]
        has = list(zip(_lengths(table["logprobs"]), table["temperature"].to_pylist(), strict=True))
        lengths = _lengths(self.table["tokens"])
        keys = _columns(self.table, "route", "item_id", "temperature")
        for route, item, temperature, length in zip(*keys, lengths, strict=True):
            if route != "rl":
                continue
            again = "compute this role for the round again"
            if item not in where:
                raise UserError(f"logprobs (role {role}): no row for the shard's item {item}; {again}")
            found = has[where[item]]
            if found != (length, temperature):
                raise UserError(
                    f"logprobs (role {role}): item {item} has {found[0]} log-probs at temperature {found[1]}, its shard "
                    f"row {length} tokens at {temperature}; {again}"
                )


_NEEDED = (
    *("item_id", "prompt_id", "route", "teacher", "round", "source_round", "temperature", "prompt_tokens", "tokens"),
    *("old_logprobs", "finish_reason", "reward", "correct", "advantage", "w_sft", "w_grpo", "w_gal"),
    "group_size",
)


def _columns(table: pa.Table, *names: str) -> list[list]:
    return [table[name].to_pylist() for name in names]


def _lengths(lists: pa.ChunkedArray) -> list[int | None]:
    return pc.call_function("list_value_length", [lists]).to_pylist()


def _numbers(cell: pa.ListScalar, dtype: type) -> np.ndarray:
    return cell.values.to_numpy(zero_copy_only=False).astype(dtype)


def _check(shards: pa.Table, partial: bool) -> None:
    """What the objective assumes of a shard. Raises UserError naming the first row or group that breaks it."""
    groups: dict[str, list[tuple[int, float]]] = {}
    prompts = _lengths(shards["prompt_tokens"])
    tokens = _lengths(shards["tokens"])
    olds = _lengths(shards["old_logprobs"])
    light = _columns(shards, "route", "item_id", "prompt_id", "group_size", "w_gal", "temperature")
    with_trace = {prompt for route, _, prompt, size, *_ in zip(*light, strict=True) if route == "sft" and size > 1}
    for route, item, prompt, size, w_gal, temperature, p, t, old in zip(*light, prompts, tokens, olds, strict=True):
        if route not in ("sft", "rl"):
            raise UserError(f"shards: item {item} has route {route!r}; expected sft or rl")
        if not p or not t:
            raise UserError(f"shards: item {item} has {p} prompt and {t} response tokens; both need at least one")
        if route == "rl":
            if old != t:
                raise UserError(f"shards: item {item} has {old} old_logprobs for {t} tokens; expected one a token")
            if temperature <= 0:
                raise UserError(f"shards: item {item} was sampled at temperature {temperature}; training needs above 0")
            groups.setdefault(prompt, []).append((size, w_gal))
    for prompt, rows in () if partial else groups.items():
        members = len(rows) + (prompt in with_trace)
        if any(size != members for size, _ in rows):
            raise UserError(
                f"shards: the group of prompt {prompt} has {members} members and says group_size {rows[0][0]}; "
                "a group is trained on whole or not at all: grade the round again"
            )
        if len({w for _, w in rows}) > 1:
            raise UserError(f"shards: the group of prompt {prompt} has several w_gal; GAL is one term a group")
