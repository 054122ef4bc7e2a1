"""Renders the reference pages from schemas/: `docs/data.md` (tables) and `docs/recipe.md` (recipe keys).

`python docs/render.py` writes them, `--check` fails if they differ from what is committed.
"""

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from schemas.recipe import Recipe
from schemas.tables import data_md

HERE = Path(__file__).parent


def recipe_md() -> str:
    """Every key of the recipe: type, default, meaning. One section for each table, in the order they are met."""
    lines = [
        "# Recipe keys",
        "",
        "Rendered from `schemas/recipe.py` by `make docs`; do not edit. Unknown keys are errors.",
        "",
    ]
    queue: list[tuple[str, type[BaseModel]]] = [("(top level)", Recipe)]
    seen: set[type] = set()
    while queue:
        name, model = queue.pop(0)
        if model in seen:
            continue
        seen.add(model)
        doc = " ".join((model.__doc__ or "").split())
        lines += [f"## {name}", "", doc, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            kind = _kind(field.annotation).replace("|", "\\|")
            lines.append(f"| {key} | {kind} | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
            path = key if name == "(top level)" else f"{name}.{key}"
            queue += [(_section(path, m), m) for m in _models(field.annotation)]
        lines.append("")
    return "\n".join(lines)


def _section(path: str, model: type[BaseModel]) -> str:
    tag = model.model_fields.get("type")
    return f'{path}, type = "{get_args(tag.annotation)[0]}"' if tag else path


def _models(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [m for a in get_args(kind) for m in _models(a)]


def _kind(kind: Any) -> str:
    if isinstance(kind, type):
        return "table" if issubclass(kind, BaseModel) else kind.__name__
    args = get_args(kind)
    if not args:
        return str(kind)
    if all(isinstance(a, str) for a in args):
        return " | ".join(f'"{a}"' for a in args)
    names = list(dict.fromkeys(_kind(a) for a in args if a is not type(None) and (isinstance(a, type) or get_args(a))))
    origin = getattr(kind, "__origin__", None)
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {', '.join(names)}"
    return " | ".join(names) or "table"


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, BaseModel):
        return "its defaults"
    return str(value) if not isinstance(value, str) else f'"{value}"'


def main() -> int:
    pages = {HERE / "data.md": data_md(), HERE / "recipe.md": recipe_md()}
    if "--check" not in sys.argv:
        for path, text in pages.items():
            path.write_text(text)
        return 0
    stale = [p.name for p, text in pages.items() if not p.exists() or p.read_text() != text]
    if stale:
        print(f"docs/{', docs/'.join(stale)}: not what schemas/ says. Run `make docs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
