"""The study's ten-minute version: every part of it by the real command, on both worlds, with trials, budgets and a probe."""

from pathlib import Path

import pytest

from tests.tiny_runs import ROOT, dypo

TEXT = (ROOT / "recipes" / "study" / "quick.toml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ten_minute_study_runs_from_nothing_to_its_report(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text(TEXT.replace("runs/study-quick", str(tmp_path / "study")))
    said = dypo("study", tmp_path / "quick.toml", "--processes", 2, timeout=1700).stdout
    page = (tmp_path / "study" / "quick.md").read_text()
    assert "failed" not in said
    assert "12 of 12 results" in page
    for world in ("styles", "skill"):
        assert f"## World {world}" in page
    assert page.count("### At equal updates") == page.count("### At equal generated tokens: at most 30,000 of rollouts") == 2
    assert page.count("**") == 2 * 2 * 3  # one trial chosen of each method in each world
    assert "## Gradient variance" in page
    assert "<svg" in (tmp_path / "study" / "quick.html").read_text()
