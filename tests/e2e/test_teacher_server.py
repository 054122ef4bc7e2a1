"""A teacher behind a real HTTP server on loopback that fails in every way: exit code 1, rows kept, the same command goes on."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest

from tests.tiny_runs import dypo, table, write_recipe

MODE: dict[str, object] = {"now": "ok", "served": 0}


def served() -> int:
    """Requests so far."""
    count = MODE["served"]
    assert isinstance(count, int)
    return count


class Teacher(BaseHTTPRequestHandler):
    """Chat completions whose answer is the question; `MODE` says how it misbehaves."""

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "echo"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if not body:
            return  # the client was ended in the middle of a request
        asked = json.loads(body)
        MODE["served"] = served() + 1
        mode = str(MODE["now"])
        if mode == "half" and served() > 60:
            mode = "500"
        if mode == "poison":
            mode = "400" if asked["messages"][-1]["content"] == MODE["poisoned"] else "ok"
        if mode in ("400", "500", "429"):
            self.reply(int(mode), {"error": {"message": "no"}})
        elif mode == "garbage":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello")
        elif mode == "slow":
            threading.Event().wait(3)
        else:
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": asked["messages"][-1]["content"]},
            }
            usage = {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
            said = {"id": "1", "object": "chat.completion", "created": 1, "model": "echo", "choices": [choice]}
            self.reply(200, {**said, "usage": usage})

    def reply(self, code: int, body: dict) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    MODE.update(now="ok", served=0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def recipe(tmp_path: Path, address: str) -> Path:
    engine = f'engine = {{ type = "openai", base_url = "{address}", model = "echo", retries = 0, timeout_s = 1.0, concurrency = 4 }}'
    path = write_recipe(
        tmp_path, **{'engine = {{ type = "program", program = "tiny.left" }}'.replace("{{", "{").replace("}}", "}"): engine}
    )
    dypo("ingest", path)
    return path


@pytest.mark.parametrize("mode", ["500", "429", "garbage", "slow"])
def test_a_server_that_fails_ends_in_exit_code_1_and_one_clear_error(mode: str, tmp_path: Path, address: str) -> None:
    path = recipe(tmp_path, address)
    MODE["now"] = mode
    got = dypo("generate", "teachers", path, check=False)
    assert got.returncode == 1, got.stderr
    assert "Traceback" not in got.stderr
    assert address in got.stderr
    MODE["now"] = "ok"
    dypo("generate", "teachers", path)
    assert table(tmp_path / "run", "traces").height == 60 * 3


def test_a_server_that_is_down_is_told_at_once(tmp_path: Path, address: str) -> None:
    nobody = address.replace(address.split(":")[2].split("/")[0], "9")
    got = dypo("generate", "teachers", recipe(tmp_path, nobody), check=False, timeout=60)
    assert got.returncode == 1
    assert nobody in got.stderr


def test_a_server_that_dies_midway_loses_no_finished_row(tmp_path: Path, address: str) -> None:
    path = recipe(tmp_path, address)
    MODE["now"] = "half"
    dypo("generate", "teachers", path, "--set", "teachers.left.samples=3", check=False)
    kept = sum(1 for _ in (tmp_path / "run" / "traces" / "teacher=left").glob("part-*.parquet"))
    assert kept > 0
    before = served()
    MODE["now"] = "ok"
    dypo("generate", "teachers", tmp_path / "run")
    traces = table(tmp_path / "run", "traces")
    assert traces.filter(traces["teacher"] == "left").height == 180
    assert served() - before < 180


def test_a_budget_that_is_used_up_ends_in_exit_code_1_and_a_bigger_one_goes_on(tmp_path: Path, address: str) -> None:
    path = recipe(tmp_path, address)
    got = dypo("generate", "teachers", path, "--set", "teachers.left.engine.budget={tokens=200}", check=False)
    assert got.returncode == 1
    assert "teacher 'left': budget.tokens = 200 is used up" in got.stderr
    assert "Finished rows are kept. Raise it, then run the same command again" in got.stderr
    before = served()
    assert 20 <= before < 20 + 4
    dypo("generate", "teachers", path, "--set", "teachers.left.engine.budget={tokens=800}")
    assert served() == 60
    assert table(tmp_path / "run", "traces").filter(pl.col("teacher") == "left").height == 60
    manifest = json.loads((tmp_path / "run/traces/teacher=left/manifest.json").read_text())
    assert manifest["facts"]["note"] == "gives no log-probs; 300 prompt and 600 completion tokens"


def test_one_poisoned_prompt_is_a_row_with_its_reason_and_the_rest_completes(tmp_path: Path, address: str) -> None:
    path, run = recipe(tmp_path, address), tmp_path / "run"
    poisoned = table(run, "prompts").filter(pl.col("split") == "train").row(7, named=True)
    MODE.update(now="poison", poisoned=poisoned["messages"][-1]["content"])
    assert "made 59 rows, 1 failed" in dypo("generate", "teachers", path).stdout
    (failure,) = table(run, "failures").to_dicts()
    assert (failure["stage"], failure["teacher"], failure["prompt_id"]) == ("teachers", "left", poisoned["prompt_id"])
    assert failure["why"] == "status 400: no"
    shown = dypo("explain", run, poisoned["prompt_id"]).stdout
    assert "could not be had" in shown
    assert "status 400: no" in shown
    assert "nothing harmed" in dypo("verify", run).stdout
    before, MODE["now"] = served(), "ok"
    assert "added 1 rows (60 in all)" in dypo("generate", "teachers", path).stdout
    assert served() == before + 1
    assert table(run, "failures").is_empty()
    assert not (run / "failures/stage=teachers/teacher=left").exists()


def test_failures_past_the_share_stop_the_stage_and_are_rows_all_the_same(tmp_path: Path, address: str) -> None:
    path, run = recipe(tmp_path, address), tmp_path / "run"
    texts = table(run, "prompts").filter(pl.col("split") == "train")["messages"]
    MODE.update(now="poison", poisoned=texts[7][-1]["content"])
    got = dypo("generate", "teachers", path, "--set", "teachers.left.engine.max_failed=0.01", check=False)
    assert got.returncode == 1
    assert "1 of 60 samples failed for good (at most 1% may)" in got.stderr
    assert "table failures has each reason" in got.stderr
    assert table(run, "failures").height == 1
    assert (
        "made 59 rows, 1 failed"
        in dypo("generate", "teachers", path, "--set", "teachers.left.engine.max_failed=0.02").stdout
    )
