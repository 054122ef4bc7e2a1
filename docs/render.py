"""Renders the reference pages: `docs/data.md` (tables), `docs/recipe.md` and `docs/study_keys.md` (keys), `docs/methods/` (a page for each method).

`python docs/render.py` writes them, `--check` fails if they differ from what is committed.
"""

import ast
import inspect
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from schemas.methods import ALL, AnyMethod, Method
from schemas.recipe import Recipe
from schemas.study import Study
from schemas.tables import data_md

HERE = Path(__file__).parent


def keys_md(root: type[BaseModel], title: str) -> str:
    """Every key of a TOML file: type, default, meaning. One section for each table, in the order they are met."""
    lines = [
        f"# {title}",
        "",
        f"Rendered from `{root.__module__.replace('.', '/')}.py` by `make docs`; do not edit. Unknown keys are errors.",
        "",
    ]
    queue: list[tuple[str, type[BaseModel]]] = [("(top level)", root)]
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


# ---------------------------------------------------------------- methods
LOSSES = HERE.parent / "trainer" / "losses"
ELSEWHERE = {"bilevel_update": "trainer/bridge.py", "fit": "pipeline/discriminator.py"}  # function -> file
ROUNDS = range(3)  # as many as a method has stages


def methods_md() -> dict[Path, str]:
    """A page for each method: its module's docstring, its keys with what was published, and the code of its three answers and losses."""
    index = ["# Methods", "", "Rendered from `schemas/methods/` by `make docs`; do not edit.", "", INDEX, ""]
    index += ["| type | what | groups of | traces of | advantage |", "|---|---|---|---|---|"]
    pages = {}
    for method in _models(AnyMethod):
        name = _tag(method)
        path = inspect.getsourcefile(method)
        assert path is not None
        text = Path(path).read_text()
        title, _, body = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")
        made = method.model_validate({"type": name} | {k: "DIR" for k, f in method.model_fields.items() if _needed(k, f)})
        pages[HERE / "methods" / f"{name}.md"] = "\n".join(
            [
                f"# {name}",
                "",
                "Rendered from `schemas/methods/" + Path(path).name + "` by `make docs`; do not edit.",
                "",
                title,
                "",
                body,
                "",
                f'## Keys of `train.method` with `type = "{name}"`',
                "",
                "| key | default | meaning |",
                "|---|---|---|",
                *_method_keys(made),
                "",
                "## The code",
                "",
                "```python",
                *_class_body(text),
                *(line for base in _bases(method) for line in ("", "", *inspect.getsource(base).rstrip().splitlines())),
                "```",
                "",
                f"and in {_places(made)}, combined by `trainer/objective.py` ([losses.md](../losses.md)):",
                "",
                "```python",
                "\n\n\n".join(_function(f) for f in _functions_of(made)),
                "```",
                "",
            ]
        )
        routings = [made.routing(round) for round in ROUNDS]
        groups, traces = (
            ", ".join(g for g in ALL if any(g in getattr(r, route) for r in routings)) for route in ("rl", "sft")
        )
        traces = traces or ("with the group" if routings[0].union else "none")
        traces += " (first rounds)" if routings[0].sft and not routings[-1].sft else ""
        advantage = {"std": "divided by std", "none": "centred"}[made.loss.grpo.advantage] if groups else ""
        advantage += ", with the trace" if routings[0].union else ""
        advantage = "of each token" if made.loss.rollout_term == "distill" else advantage
        what = " ".join((method.__doc__ or "").split()).partition(" (docs/")[0]
        index.append(f"| [{name}]({name}.md) | {what} | {groups or 'none'} | {traces} | {advantage} |")
    pages[HERE / "methods" / "README.md"] = "\n".join([*index, ""])
    return pages


INDEX = (
    "A method is three answers (`schemas/methods/base.py`): which grades' prompts become rows (`routing`), what is computed of the rows of "
    "a step (`loss`), and how the components are mixed (`weights`). It is chosen by `train.method = { type = ... }`; keys that are not given "
    "are as published. All run on the same stored rows, with the same denominators, through the same loop."
)


def _needed(key: str, field: Any) -> bool:
    return key != "type" and field.is_required()


def _tag(method: type[BaseModel]) -> str:
    return get_args(method.model_fields["type"].annotation)[0]


def _method_keys(made: BaseModel, path: str = "") -> list[str]:
    lines = []
    for key, field in type(made).model_fields.items():
        value = getattr(made, key)
        if isinstance(value, BaseModel):
            lines += _method_keys(value, f"{path}{key}.")
        elif key != "type":
            shown = "required" if field.is_required() else _default(value)
            lines.append(f"| {path}{key} | {shown} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return lines


def _bases(method: type[BaseModel]) -> list[type[BaseModel]]:
    """What a method has in common with its kin: the classes between it and Method."""
    return [base for base in method.__mro__[1:] if issubclass(base, Method) and base is not Method]


def _class_body(text: str) -> list[str]:
    """The class of a method's module, from its first own line on."""
    tree = ast.parse(text)
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return text.splitlines()[found.lineno - 1 : found.end_lineno]


def _functions_of(made: Any) -> list[str]:
    """The losses that a method's `loss` names, and what has a file of its own (ELSEWHERE)."""
    loss, routings = made.loss, [made.routing(round) for round in ROUNDS]
    names = []
    if any(r.rl for r in routings):
        of_rollouts = {"clip": "clipped_surrogate", "cispo": "cispo", "unclipped": "unclipped_surrogate"}[
            loss.grpo.surrogate
        ]
        of_rollouts = "sequence_surrogate" if loss.grpo.ratio == "sequence" else of_rollouts
        names.append("self_surrogate" if loss.rollout_term == "self" else of_rollouts)
    if loss.off_policy != "none":
        names.append("off_policy_surrogate")
    if loss.gal is not None:
        names.append({"pairs": "group_alignment", "flat": "flat_alignment"}[loss.gal.form])
    if any(r.sft for r in routings):
        names.append("sft")
        names += {"plain": [], "phi": ["phi_weights"], "entropy": ["entropy_weights"]}[loss.trace_weight]
    names += ["bilevel_update"] * ("shadow" in made.rates)
    names += ["fit"] * any(r.discriminator is not None for r in routings)
    return names


def _places(made: Any) -> str:
    return " and ".join(
        f"`{p}`" for p in ["trainer/losses/", *(ELSEWHERE[f] for f in _functions_of(made) if f in ELSEWHERE)]
    )


def _function(name: str) -> str:
    """The source of a function in trainer/losses/ or ELSEWHERE, without importing torch."""
    for path in [HERE.parent / ELSEWHERE[name]] if name in ELSEWHERE else sorted(LOSSES.glob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    raise KeyError(name)


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
    pages = {
        HERE / "data.md": data_md(),
        HERE / "recipe.md": keys_md(Recipe, "Recipe keys"),
        HERE / "study_keys.md": keys_md(Study, "Study keys"),
        **methods_md(),
    }
    if "--check" not in sys.argv:
        for path, text in pages.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return 0
    stale = [str(p.relative_to(HERE)) for p, text in pages.items() if not p.exists() or p.read_text() != text]
    if stale:
        print(f"docs/{', docs/'.join(stale)}: not what the code says. Run `make docs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
