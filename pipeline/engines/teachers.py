"""From a recipe's teacher to the engine that writes its traces, and what rows depend on besides the recipe.

Besides what engines/base.py asks for, these engines have `complete` (False: a sample that is not produced is
absent, not failed) and `note`, one line about what they found ("" until the first list comes, or for good).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.engines.base import Engine
from schemas.recipe import OpenAIEngine, ProgramEngine, Teacher


class TeacherEngine(Engine, Protocol):
    """An engine that may have nothing for some samples."""

    complete: bool
    note: str


def teacher_engine(teacher: Teacher, kept: Sequence[Path] = ()) -> TeacherEngine:
    """The teacher's engine. UserError if its file, program or package is missing, before any work.

    `kept`: the parts of its traces that are there already, whose cost counts towards its budget.
    """
    who = f"teacher '{teacher.name}'"
    config = teacher.engine
    if isinstance(config, ProgramEngine):
        from pipeline.engines.program import ProgramTeacher

        return ProgramTeacher(config.program, who)
    if isinstance(config, OpenAIEngine):
        from pipeline.engines.openai import OpenAITeacher
        from pipeline.engines.spending import stored_usage

        return OpenAITeacher(config, who, stored_usage(kept))
    from pipeline.engines.replay import ReplayTeacher

    return ReplayTeacher(config, who)


def content_id(teacher: Teacher) -> str | None:
    """sha256 of the file that the traces come from or are computed by; None for built-ins and servers."""
    from pipeline.sources import files_digest

    config = teacher.engine
    if isinstance(config, OpenAIEngine):
        return None
    if isinstance(config, ProgramEngine):
        import hashlib

        from pipeline.engines.program import user_file

        path: Path | None = user_file(config.program, f"teacher '{teacher.name}'")
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    return files_digest(config.path)
