"""How a recipe names its verifiers, and the words that a verdict may use.

A recipe has `[score.verifiers.NAME] type = "exact" extract = "..."`, and a prompt's `verifier` column says NAME. The
type picks the model, so each verifier takes only the options that it has.
"""

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Status = Literal["ok", "wrong", "unparseable", "timeout", "truncated", "gold_bad", "error"]
STATUSES: tuple[str, ...] = get_args(Status)


class _Scorer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MathScorer(_Scorer):
    """Mathematical equality (math-verify) of the text's final answer and the gold one."""

    type: Literal["math"] = "math"


class ExactScorer(_Scorer):
    """Equality of strings, after stripping white space at both ends."""

    type: Literal["exact"] = "exact"
    extract: str | None = None
    """A regular expression with one group; its last match is the answer. Without it the whole text is."""

    @field_validator("extract")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as reason:
                raise ValueError(f"not a regular expression: {reason}") from None
            if groups != 1:
                raise ValueError(f"wants exactly one group (...), this pattern has {groups}")
        return pattern


class ChoiceScorer(_Scorer):
    """The letter of a multiple-choice question; a gold digit 1-9 stands for A-I."""

    type: Literal["choice"] = "choice"


class GymScorer(_Scorer):
    """A reasoning-gym task's own score; correct only at exactly 1.0, since lower scores are partial credit."""

    type: Literal["reasoning_gym"] = "reasoning_gym"


class UserScorer(_Scorer):
    """A function of the user's, in TRL's or verl's signature."""

    type: Literal["user"] = "user"
    function: str
    """`path/to/file.py:function`."""
    correct_at: float = Field(default=1.0, allow_inf_nan=False)
    """Correct from this value on. The value itself is kept as the reward."""
    completions: Literal["auto", "messages", "text"] = "auto"
    """What TRL's `completions` (and `prompts`) hold. auto: messages if the function's source mentions "content"."""

    @field_validator("function")
    @classmethod
    def _names_a_file_and_a_function(cls, spec: str) -> str:
        path, colon, name = spec.rpartition(":")
        if not colon or not path.endswith(".py") or not name.isidentifier():
            raise ValueError(f"wants path/to/file.py:function, found {spec!r}")
        return spec


ScorerConfig = Annotated[MathScorer | ExactScorer | ChoiceScorer | GymScorer | UserScorer, Field(discriminator="type")]
