"""The report says what the tables say, in one file that asks for nothing and runs nothing."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import report
from pipeline.page import CSS
from pipeline.report import build_report
from tests import synthetic_run

QUERIES = sorted((Path(report.__file__).parent / "sql" / "report").glob("*.sql"))
VOID = {"meta", "br", "img", "path", "use", "rect", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Tags, attributes, visible text and ids; fails on a closing tag that closes nothing."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def tables():
    return synthetic_run.build_tables()


@pytest.fixture(scope="module")
def page_source(synthetic, tables):
    return build_report(synthetic, synthetic_run.recipe(), synthetic_run.manifests(tables))


@pytest.fixture(scope="module")
def page(page_source):
    return Page(page_source)


def test_every_picture_and_section_is_there(page):
    for words in (
        "Results Difficulty Training Verdicts and teachers Sample rollouts Provenance",
        "Evals by checkpoint",
        "Grade shares by round",
        "Train reward",
        "Offline ratio",
        "Policy entropy",
        "Gradient norm",
        "Response length",
        "Off-policy health",
        "Losses by component",
        "Grade transitions",
        "Verifier status",
        "gates, and why not",
    ):
        assert words in page.text
    assert page.tags >= {"svg", "table", "details", "figure"}


def test_numbers_are_the_tables(page, synthetic):
    first, last = synthetic.execute(
        "select value from evals where suite = 'sums' and metric = 'avg@4' order by round, step"
    ).fetchall()[:: synthetic_run.ROUNDS]
    assert f"{100 * first[0]:.1f} % → {100 * last[0]:.1f} %" in page.text
    assert "sums in distribution avg@4 16" in page.text
    assert "longer out of distribution avg@4 10" in page.text
    assert "24 steps 279 sequences" in page.text
    assert "columns 30 30 15 (50 %) 8 (67 %) 5 (42 %)" in page.text
    for policy in synthetic_run.POLICIES:
        assert policy in page.text
    assert "abc1234" in page.text


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href" and value}
    assert targets <= set(page.ids)


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src", (tag, value)
        assert name != "href" or (value or "").startswith("#"), (tag, value)
        assert "//" not in (value or ""), (tag, name, value)
        assert not re.search(r"url\((?!#)", value or ""), (tag, name, value)
    assert any(v and "default-src 'none'" in v for _, _, v in page.attributes)
    assert "@import" not in CSS
    assert "url(" not in CSS


def test_model_output_is_text_and_nothing_else(synthetic, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_PROMPTS", 1000)
    source = build_report(synthetic, None, [])
    page = Page(source)
    assert '<script>alert("x")</script><img src=http://outside.invalid/a.png onerror=alert(1)> &' in page.text
    assert not page.tags & {"script", "img", "b[/bold]"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", source)
    assert "␛[31mred␀" in page.text


def test_the_same_tables_give_the_same_bytes(synthetic, tables, page_source):
    assert build_report(synthetic, synthetic_run.recipe(), synthetic_run.manifests(tables)) == page_source


def test_a_run_without_rows_gives_sentences(synthetic):
    source = build_report(synthetic_run.connect(synthetic_run.empty_tables()), None, [])
    page = Page(source)
    assert "svg" not in page.tags
    for words in ("No evals yet", "No grades yet", "No training metrics yet", "No verdicts yet", "No teacher traces yet"):
        assert words in page.text
    assert page.open == []


@pytest.mark.parametrize("kept", sorted(synthetic_run.ARROW))
def test_any_table_alone_is_enough(tables, kept):
    """A run is looked at half-way: whatever is there is shown, the rest is a sentence."""
    partial = {**synthetic_run.empty_tables(), kept: tables[kept]}
    assert "</html>" in build_report(synthetic_run.connect(partial), synthetic_run.recipe(), [])


def test_a_long_run_stays_small_and_bad_numbers_are_left_out(tables):
    rows = [
        {"round": 0, "step": s, "name": n, "value": float("nan") if s % 7 == 0 else s % 11, "when": 0.0}
        for s in range(5000)
        for n in ("reward", "loss/total", "grad_norm")
    ]
    metrics = synthetic_run.pa.Table.from_pylist(rows, schema=synthetic_run.ARROW["metrics"])
    source = build_report(synthetic_run.connect({**tables, "metrics": metrics}), None, [])
    assert len(source) < 500_000
    assert "nan" not in source.lower().replace("provenance", "")


@pytest.mark.parametrize("query", QUERIES, ids=lambda p: p.stem)
def test_a_report_query_is_one_ordered_select_that_states_its_grain(query, synthetic):
    sql = query.read_text(encoding="utf-8")
    assert sql.startswith(f"-- report/{query.name}\n-- grain: ")
    assert "reads: " in sql
    assert "order by" in sql or "one row for the whole run" in sql
    assert not sql.rstrip().endswith(";")
    (statement,) = synthetic.extract_statements(sql)
    assert statement.type.name == "SELECT"


GRAINS = {
    "evals": ("suite", "metric", "round", "step"),
    "eval_problems": ("suite", "round", "step", "prompt_id"),
    "grade_mix": ("round", "grade"),
    "metrics": ("name", "round", "step"),
    "reasons": ("round", "reason", "grade"),
    "samples": ("rollout_id",),
    "teachers": ("teacher",),
    "tokens": ("round", "route", "teacher"),
    "transitions": ("from_round", "to_round", "from_grade", "to_grade"),
    "verifier_status": ("kind", "teacher", "suite", "round", "step", "status"),
    "policies": ("policy", "use"),
}
PARAMETERS = {"metrics": {"names": ["reward", "entropy"]}, "samples": {"prompts": 3}}


@pytest.mark.parametrize("query", sorted(GRAINS))
def test_a_report_query_keeps_its_grain(query, synthetic):
    rows = report._rows(synthetic, query, **PARAMETERS.get(query, {}))
    keys = [tuple(row[c] for c in GRAINS[query]) for row in rows]
    assert rows
    assert len(keys) == len(set(keys))


def test_steps_are_counted_over_rounds(synthetic):
    xs = [r["x"] for r in report._rows(synthetic, "metrics", names=["reward"])]
    assert xs == list(range(1, 2 * synthetic_run.STEPS + 1))
    at = {(r["round"], r["step"]): r["x"] for r in report._rows(synthetic, "evals")}
    assert at == {(0, 0): 0, (0, 12): 12, (1, 12): 24}


def test_transitions_bridge_a_round_that_drew_other_prompts(tables):
    grades = [g for g in tables["grades"].to_pylist() if g["source_round"] == g["round"]]
    later = [{**g, "round": g["round"] * 2, "source_round": g["source_round"] * 2} for g in grades]
    table = synthetic_run.pa.Table.from_pylist(later, schema=synthetic_run.ARROW["grades"])
    rows = report._rows(synthetic_run.connect({**tables, "grades": table}), "transitions")
    assert {(r["from_round"], r["to_round"]) for r in rows} == {(0, 2)}
    assert sum(r["prompts"] for r in rows) == 29
