"""The recipe says what is wrong with it: the key, what was expected, what was found, the nearest known key."""

import tomllib
from pathlib import Path

import pytest

from pipeline.context import load, resolved
from schemas.errors import UserError
from schemas.methods.dypo import PRESETS, DypoMethod
from schemas.recipe import parse_recipe
from tests.tiny_runs import RECIPE, ROOT, write_recipe

LEFT = 'engine = { type = "program", program = "tiny.left" }'


def server(url: str) -> str:
    return f'engine = {{ type = "openai", base_url = "{url}", model = "m" }}'


SUITES = sorted((ROOT / "recipes" / "suites").glob("*.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert load(path).recipe.name


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.name)
def test_every_shipped_suite_goes_into_a_recipe_and_brings_what_it_needs(tmp_path: Path, path: Path) -> None:
    suite = tomllib.loads(path.read_text())
    assert set(suite) == {"sources", "score", "eval"}
    plain, recipe = load(write_recipe(tmp_path)).recipe, load(including(tmp_path, path)).recipe
    names = {s["name"] for s in suite["eval"]["suites"]}
    assert {s.name for s in recipe.eval.suites} == names | {s.name for s in plain.eval.suites}
    assert all(s.split == "eval" for s in recipe.sources if s.name in {x["name"] for x in suite["sources"]})


def test_all_shipped_suites_go_together(tmp_path: Path) -> None:
    assert len(load(including(tmp_path, *SUITES)).recipe.eval.suites) == 1 + 3 + 3 + 7


def including(folder: Path, *files: Path) -> Path:
    names = ", ".join(f'"{file}"' for file in files)
    return write_recipe(folder, **{"rounds = 2": f"rounds = 2\ninclude = [{names}]"})


def test_the_papers_protocol_is_what_the_suites_say(tmp_path: Path) -> None:
    """T 0.6, avg@32 on AIME and AMC, one sample elsewhere, whatever the recipe's own [eval] says."""
    recipe = load(including(tmp_path, *(p for p in SUITES if p.stem not in ("tiny", "reasoning_gym")))).recipe
    said = {s.name: (s.n, s.temperature, s.top_p, s.max_tokens) for s in recipe.eval.suites if s.name != "id"}
    many, one = (32, 0.6, 1.0, 8192), (1, 0.6, 1.0, 8192)
    assert said == {
        "aime24": many, "aime25": many, "amc": many, "math500": one, "minerva": one, "arc_c": one, "gpqa_diamond": one,
    }  # fmt: skip


def test_a_recipe_changes_one_key_of_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text(
        """[score.verifiers.sum]
type = "exact"
[[eval.suites]]
name = "id"
sources = ["sums"]
n = 3
[[eval.suites]]
name = "more"
sources = ["fresh"]
"""
    )
    path = write_recipe(tmp_path, **{"rounds = 2": 'rounds = 2\ninclude = ["more.toml"]'})
    recipe = load(path, ["eval.suites.more.n=7"]).recipe
    one, more = recipe.eval.suites
    assert (one.name, one.sources, one.n) == ("id", ["fresh"], 2)  # its own values stand
    assert (more.name, more.n) == ("more", 7)
    assert recipe.score.verifiers["sum"].extract == "^[^>]*>([0-9]+)$"
    assert "include" not in resolved(load(path))


@pytest.mark.parametrize(
    ("include", "files", "told"),
    [
        ('"more.toml"', {}, "more.toml is no file. TOML files in that folder: small.toml"),
        ('"a.toml"', {"a.toml": 'include = ["b.toml"]'}, "an included file cannot include others"),
        ('"a.toml"', {"a.toml": "[eval"}, "a.toml: not valid TOML"),
        ("3", {}, "include: expected a list of files"),
        (
            '"a.toml", "b.toml"',
            {"a.toml": 'score.verifiers.x = { type = "math" }', "b.toml": 'score.verifiers.x = { type = "exact" }'},
            "b.toml and a file before it both give score.verifiers.x.type: 'math' and 'exact'",
        ),
        ('"a.toml"', {"a.toml": "evl.n = 1"}, "evl: unknown key; did you mean 'eval'?"),
    ],
)
def test_a_bad_include_is_refused_with_the_way_out(tmp_path: Path, include: str, files: dict[str, str], told: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as e:
        load(write_recipe(tmp_path, **{"rounds = 2": f"rounds = 2\ninclude = [{include}]"}))
    assert told in str(e.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "prompts_per_round = 40",
            "prompts_per_rond = 40",
            "rollouts.prompts_per_rond: unknown key; did you mean 'prompts_per_round'?",
        ),
        ("lr = 1e-3", "lr = 1e-3, alhpa = 0.5", "train.method.alhpa: unknown key; did you mean 'alpha'?"),
        ("k = 4", "k = 1", "rollouts.k: a group needs at least 2 rollouts"),
        ("k = 4", "k = 4\ntop_p = 0.9", "rollouts.top_p: training rollouts need top_p = 1, found 0.9"),
        (
            'type = "dypo", ',
            'type = "hptt", ',
            "train.method.type: 'hptt' is not known; did you mean 'hpt'? Known here: sft, grpo",
        ),
        ('type = "dypo", ', "", "train.method: needs a `type` (sft | grpo | dr_grpo"),
        ('name = "noisy"', 'name = "left"', "teachers: the name 'left' is given twice"),
        (
            'verifier = "sum"\nlimit = 60',
            'verifier = "sun"\nlimit = 60',
            "verifier 'sun' is not among score.verifiers (sum)",
        ),
        ('sources = ["fresh"]', 'sources = ["stale"]', "no source is named 'stale'"),
        ("pass_k = [1, 2]", "pass_k = [0]", "eval.suites.0.pass_k.0: Input should be greater than or equal to 1 (found 0)"),
        ("pass_k = [1, 2]", "pass_k = [1, 4]", "pass@4 needs n >= that, found n = 2"),
        (
            'verifier = "sum"\nlimit = 60',
            'verifier = "sum"\ntemplate = "thinking"\nlimit = 60',
            "template: expected boxed, letter, think, think_letter, or a text of yours with {problem} in it, found 'thinking'",
        ),
        (
            'verifier = "sum"\nlimit = 60',
            'verifier = "sum"\ntemplate = "think"\nsystem = "s"\nlimit = 60',
            "template = 'think' has a system message of its own",
        ),
        (
            "threads = 1",
            'threads = 1\ntemplate = "base"',
            "policy.template: expected chat, chat_think, base_think, or a text of yours with {problem} in it, found 'base'",
        ),
        (
            'verifier = "sum"\nlimit = 60',
            'verifier = "sum"\nhub = "MATH-500"\nlimit = 60',
            "hub: String should match pattern",
        ),
        ("[train]", "[grade]\nhard_max_successes = 2\neasy_max_failures = 2\n[train]", "must be below rollouts.k = 4"),
        (LEFT, server("localhost:8000/v1"), "teachers.0.engine.base_url: expected http(s)://host:port"),
        (
            'engine = { type = "hf", batch_sequences = 40 }',
            "engine = { type = 'vllm_server', base_url = 'http://me:pw@host' }",
            "rollouts.engine.base_url: give the address alone",
        ),
        (
            "lr = 1e-3",
            "lr = 1e-3, grpo = { surrogate = 'unclipped', clip_high = 0.3 }",
            "surrogate = 'unclipped' has no bound",
        ),
        (LEFT, server("http://me:pw@host/v1"), "a key belongs in the environment variable that api_key_env names"),
        (LEFT, server("https://host/v1?key=pw"), "a key belongs in the environment variable that api_key_env names"),
        (
            "lr = 1e-3",
            'lr = 1e-3, grpo = { surrogate = "cispo", ratio = "sequence" }',
            "train.method.grpo: surrogate = 'cispo' weighs each token by its own ratio",
        ),
        (
            "lr = 1e-3",
            'lr = 1e-3, grpo = { surrogate = "cispo", dual_clip = 3.0 }',
            "train.method.grpo: dual_clip bounds the clipped surrogate",
        ),
        ("lr = 1e-3", 'lr = 1e-3, grpo = { truncation = "token" }', "needs old = 'trainer'"),
        (
            "lr = 1e-3",
            'lr = 1e-3, grpo = { truncation = "token", old = "trainer", ratio = "sequence" }',
            "one weight a row: truncation = 'sequence'",
        ),
        ("lr = 1e-3", "lr = 1e-3, grpo = { horizon = 8 }", "horizon belongs to aggregation = 'seq-mean-token-sum-norm'"),
        ("lr = 1e-3", 'lr = 1e-3, grpo = { aggregation = "seq-mean-token-sum-norm" }', "and is needed there"),
        (
            "lr = 1e-3",
            "lr = 1e-3, grpo = { dual_clip = 1.0 }",
            "train.method.grpo.dual_clip: Input should be greater than 1 (found 1.0)",
        ),
        (
            "lr = 1e-3",
            "lr = 1e-3, grpo = { clip_low = 1.5 }",
            "train.method.grpo.clip_low: Input should be less than or equal to 1 (found 1.5)",
        ),
        ("lr = 1e-3", "lr = 1e-3, alpha = 0.0, grpo = { kl = 0.1 }", "train.method: grpo.kl is a part of the GRPO term"),
        ("steps = 6", "steps = 0", "train.steps: Input should be greater than or equal to 1 (found 0)"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_key_and_the_way_out(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = write_recipe(tmp_path, **{old: new})
    with pytest.raises(UserError) as e:
        parse_recipe(tomllib.loads(path.read_text()), str(path))
    assert str(path) in str(e.value)
    assert told in str(e.value)
    assert "pw" not in str(e.value)  # the key that someone put into an address is not repeated


def test_majority_votes_need_a_verifier_that_extracts_answers(tmp_path: Path) -> None:
    judge = '{ type = "user", function = "f.py:f" }'
    path = write_recipe(
        tmp_path,
        **{'{ type = "exact", extract = "^[^>]*>([0-9]+)$" }': judge, "pass_k = [1, 2]": "maj = true"},
    )
    with pytest.raises(
        UserError, match=r"suites\.id: maj counts equal answers, and verifier 'sum' \(type 'user'\) extracts none"
    ):
        load(path)


def test_presets_fill_what_is_not_given_and_nothing_else() -> None:
    assert DypoMethod(preset="default") == DypoMethod()
    paper = DypoMethod(preset="paper")
    assert (paper.gal.logp_reduction, paper.gal.ref, paper.sft_reduction, paper.alpha) == ("sum", "init", "prompt", 0.5)
    official = DypoMethod.model_validate({"preset": "official", "gal": {"beta": 0.2}})
    assert (official.gal.beta, official.gal.ref, official.gal.logp_reduction) == (0.2, "none", "sum")
    assert (official.schedule, official.lr, official.sft_lr, official.gal_weight, official.grpo.ratio) == (
        "queue", 5e-7, 5e-6, 0.001, "sequence",
    )  # fmt: skip
    assert set(PRESETS) == {"default", "paper", "official"}


def test_a_second_learning_rate_belongs_to_the_queue_alone() -> None:
    with pytest.raises(ValueError, match="sft_lr belongs to schedule = 'queue'"):
        DypoMethod(sft_lr=1e-5)


@pytest.mark.parametrize("method", ["sft", "luffy", "srft", "uniform_mix", "chord", "sft_then_rl", "bridge", "prism"])
def test_a_method_of_traces_needs_a_teacher(method: str) -> None:
    data = tomllib.loads(RECIPE.format(run="run", root=ROOT))
    data["train"]["method"] = {"type": method}
    data["rounds"] = 3
    parse_recipe(data, "small.toml")
    with pytest.raises(UserError, match=rf"type = '{method}' learns from traces of every prompt, and the recipe has no"):
        parse_recipe(data | {"teachers": []}, "small.toml")


def test_sft_then_rl_needs_a_round_of_rl() -> None:
    data = tomllib.loads(RECIPE.format(run="run", root=ROOT))
    data["train"]["method"] = {"type": "sft_then_rl", "sft_rounds": 2}
    with pytest.raises(UserError, match="rounds = 2 leaves none for RL"):
        parse_recipe(data, "small.toml")
    parse_recipe(data | {"rounds": 3}, "small.toml")


def test_prism_needs_a_round_of_rl_and_a_range_of_pass_rates() -> None:
    data = tomllib.loads(RECIPE.format(run="run", root=ROOT))
    data["train"]["method"] = {"type": "prism"}
    with pytest.raises(UserError, match=r"leaves none for RL after train.method.sft_rounds = 1 and align_rounds = 1"):
        parse_recipe(data, "small.toml")
    parse_recipe(data | {"rounds": 3}, "small.toml")
    data["train"]["method"] |= {"min_pass_rate": 0.9}
    with pytest.raises(UserError, match=r"min_pass_rate 0.9 is above max_pass_rate 0.8"):
        parse_recipe(data | {"rounds": 3}, "small.toml")
