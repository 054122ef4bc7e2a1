"""How a recipe names its verifiers, and the words that a verdict may use.

A recipe has `[score.verifiers.NAME] type = "exact" extract = "..."`, and a prompt's `verifier` column says NAME. The
type picks the model, so each verifier takes only the options that it has.
"""

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from schemas.address import Address

Status = Literal["ok", "wrong", "unparseable", "timeout", "truncated", "gold_bad", "error"]
STATUSES: tuple[str, ...] = get_args(Status)


class _Scorer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _TextScorer(_Scorer):
    think: Literal["required", "optional"] | None = None
    """What of a reasoning model's text is judged: after its last `</think>` (required: without one it is unparseable; optional: then
    the whole text). Without this key: the whole text."""


class MathScorer(_TextScorer):
    """Mathematical equality (math-verify) of the text's final answer and the gold one."""

    type: Literal["math"] = "math"


class ExactScorer(_TextScorer):
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


class ChoiceScorer(_TextScorer):
    """The letter of a multiple-choice question; a gold digit 1-9 stands for A-I."""

    type: Literal["choice"] = "choice"


class GymScorer(_TextScorer):
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


class JudgeScorer(_Scorer):
    """A rubric judged by a model behind an OpenAI-compatible server. The key is read from the environment and never written anywhere."""

    type: Literal["judge"]
    base_url: Address
    model: str
    rubric: str = Field(min_length=1)
    """What a good answer is, in words; the judge also sees the question, the prompt's `answer` as reference, and the answer."""
    correct_at: float = Field(default=0.5, gt=0, le=1)
    """Correct from this score on (scores go from 0 to 1). The score itself is kept as the reward."""
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(default=8, ge=1)
    timeout_s: float = Field(default=120.0, gt=0)
    retries: int = Field(default=4, ge=0)
    """Of a request that timed out, got 429 or 5xx, or garbage."""


ScorerConfig = Annotated[
    MathScorer | ExactScorer | ChoiceScorer | GymScorer | UserScorer | JudgeScorer, Field(discriminator="type")
]
