"""The report in a real browser: no console message, no request but for the file itself, and a page that is not blank.

Chromium's own net log is the witness for requests and its stderr for the console. A second page that does break the rules
shows that both witnesses speak up.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.report import build_report
from tests import synthetic_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever is asked for is logged, and nothing leaves the machine
    "--enable-logging=stderr",
    "--v=0",
)
WIDTH, HEIGHT = 1240, 6000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chromium,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"),
]


@dataclass(frozen=True)
class Seen:
    """What the browser did with a page: console messages, addresses asked for, and the picture."""

    console: list[str]
    requests: list[str]
    screenshot: Path


def look(page: Path, folder: Path) -> Seen:
    """Opens a local page in a fresh headless Chromium."""
    folder.mkdir()
    shot, log = folder / "page.png", folder / "net.json"
    ran = subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--log-net-log={log}",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert shot.exists(), ran.stderr[-2000:]
    console = [line for line in ran.stderr.splitlines() if re.search(r"\bCONSOLE\b", line)]
    return Seen(console, _requests(log), shot)


def _requests(log: Path) -> list[str]:
    """Addresses that the page asked for. The browser's own background services ask too, with no origin behind them."""
    text = log.read_text(encoding="utf-8", errors="replace")
    try:
        data = json.loads(text)
    except json.JSONDecodeError:  # the browser may leave without closing its log
        data = json.loads(text.rstrip().rstrip(",") + "]}")
    names = {number: name for name, number in data["constants"]["logEventTypes"].items()}
    found = []
    for event in data["events"]:
        asked = event.get("params", {})
        if names.get(event["type"]) == "URL_REQUEST_START_JOB" and "url" in asked:
            from_page = asked["network_isolation_key"].startswith("file:") or asked["initiator"] != "not an origin"
            if from_page:
                found.append(asked["url"])
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    folder = tmp_path_factory.mktemp("report")
    tables = synthetic_run.build_tables()
    page = folder / "report.html"
    source = build_report(synthetic_run.connect(tables), synthetic_run.recipe(), synthetic_run.manifests(tables))
    page.write_text(source, encoding="utf-8")
    return look(page, folder / "chromium")


def test_the_console_stays_silent(seen):
    assert seen.console == []


def test_nothing_is_asked_for(seen):
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []


def test_the_page_is_drawn(seen):
    """White ground, dark text, and the three colours of the grades."""
    import matplotlib.image

    pixels = matplotlib.image.imread(seen.screenshot)[..., :3]
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    bright = pixels.mean(axis=2)
    assert 0.6 < (bright > 0.99).mean() < 0.99
    assert (bright < 0.35).mean() > 0.004
    for colour in ("#2a9187", "#e3a23a", "#b5405f"):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=2) < 0.01).sum() > 1000, colour
    rows_with_ink = (bright < 0.6).any(axis=1)
    assert rows_with_ink[: HEIGHT // 2].mean() > 0.3


def test_the_witnesses_speak_up(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><title>bad</title><img src="http://outside.invalid/a.png"><script>console.error("heard")</script>'
    )
    bad = look(page, tmp_path / "chromium")
    assert any("heard" in line for line in bad.console)
    assert "http://outside.invalid/a.png" in bad.requests
