"""Every query of docs/sql.md runs, is one that the read-only shell allows, and returns rows."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "sql.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.+?)\n\n(.+?)\n\n```sql\n(.+?)\n```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FIRST = "select round, grade, count(*) from grades group by all order by all"


def test_the_page_has_the_query_of_the_readme_and_ten_more():
    assert SECTIONS[0][2] == FIRST
    assert len(SECTIONS) >= 11
    assert len(SECTIONS) == PAGE.count("```sql\n"), "each block has a heading and a line that says what it answers"
    assert len({title for title, _, _ in SECTIONS}) == len(SECTIONS)


@pytest.mark.parametrize(("title", "query"), [(title, query) for title, _, query in SECTIONS], ids=lambda s: s[:40])
def test_a_documented_query_returns_rows(synthetic, title, query):
    (statement,) = synthetic.extract_statements(query)
    assert statement.type.name == "SELECT", title
    assert len(synthetic.execute(query).fetchall()) > 0, title


def test_documented_queries_give_the_same_rows_in_the_same_order_each_time(synthetic):
    for title, _, query in SECTIONS:
        assert synthetic.execute(query).fetchall() == synthetic.execute(query).fetchall(), title
