"""Engine `openai` against a real HTTP server on loopback that is slow, refuses, talks garbage, or dies."""

import email.utils
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.engines import openai as engine_module
from pipeline.engines.base import Ask, Failure, Sample
from pipeline.engines.openai import OpenAITeacher
from pipeline.engines.spending import Usage, stored_usage
from pipeline.engines.teachers import content_id, teacher_engine
from pipeline.store import partition
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import OpenAIEngine, Teacher
from schemas.tables import ARROW

KEY = "sk-very-secret-0123456789"
Answer = tuple[int, dict[str, str], bytes]


def chat(text: Any = "so 42", finish: Any = "stop", **message: Any) -> Answer:
    return choices([choice(text, finish, **message)])


def choice(text: Any = "so 42", finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}


def choices(some: list[dict[str, Any]], **more: Any) -> Answer:
    return 200, {}, json.dumps({"id": "x", "model": "served-model", "choices": some, **more}).encode()


def costly(body: dict[str, Any], prompt: int, completion: int) -> Answer:
    """A reply with as many choices as were asked for, and what it used."""
    texts = [choice(f"{body['messages'][-1]['content']} {i}") for i in range(body.get("n", 1))]
    return choices(texts, usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0})


def refusal(status: int, message: str = "no", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class Server:
    """Answers the n-th chat request with `script(n, body)`; None drops the connection."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer | None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: list[float] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(server.requests)
                    server.requests.append(body)
                    server.times.append(time.monotonic())
                    server.keys.add(self.headers["Authorization"])
                answer = script(n, body) if self.path == "/v1/chat/completions" else refusal(404, "no such path")
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._send(*answer)

            def do_GET(self) -> None:
                self._send(200, {}, json.dumps({"object": "list", "data": [{"id": "served-model"}]}).encode())

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if "X-Cut" in headers else body)
                    self.close_connection |= "X-Cut" in headers
                except OSError:  # the client gave up
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


Serve = Callable[[Callable[[int, dict[str, Any]], Answer | None]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(script: Callable[[int, dict[str, Any]], Answer | None]) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BACKOFF_S", 0.01)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config(url: str, **more: Any) -> OpenAIEngine:
    values = {"type": "openai", "base_url": url, "model": "m", "api_key_env": "TEACHER_KEY", "retries": 2, "timeout_s": 60}
    return OpenAIEngine.model_validate(values | more)


def asks(prompts: int, samples: int = 1) -> list[Ask]:
    return [
        Ask(f"id{i}", [{"role": "user", "content": f"p{i}"}], tuple(range(samples)), i, "42", {}) for i in range(prompts)
    ]


def got(url: str, work: list[Ask], finished: frozenset = frozenset(), **more: Any) -> list[Sample | Failure]:
    batches = OpenAITeacher(config(url, **more), "teacher 't'").run(work, finished)
    return sorted((item for batch in batches for item in batch), key=lambda r: (r.prompt_id, r.sample))


def failed(
    url: str, work: list[Ask], finished: frozenset = frozenset(), spent: Usage = Usage(), **more: Any
) -> tuple[list[Sample | Failure], str]:
    """(what came before the WorkError, its message)."""
    rows: list[Sample | Failure] = []
    with pytest.raises(WorkError) as e:  # noqa: PT012
        for batch in OpenAITeacher(config(url, **more), "teacher 't'", spent).run(work, finished):
            rows += batch
    assert KEY not in str(e.value)
    return rows, str(e.value)


# ---------------------------------------------------------------- a good server
def test_a_server_that_ignores_n_is_asked_one_by_one_with_a_seed_for_each_sample(serve: Serve) -> None:
    server = serve(lambda n, body: chat(f"{body['messages'][-1]['content']} {body['seed']}"))
    engine = OpenAITeacher(config(server.url, temperature=0.3, max_tokens=9, concurrency=1))
    rows = [row for batch in engine.run(asks(5, samples=3), frozenset()) for row in batch]
    assert len(server.requests) == len(rows) == 15
    assert server.keys == {f"Bearer {KEY}"}
    for row in rows:
        assert isinstance(row, Sample)
        i = int(row.prompt_id[2:])
        seed = seed_from(i, row.sample) % 2**31
        assert row.text == f"p{i} {seed}"
        assert (row.finish_reason, row.model) == ("stop", "served-model")
        assert json.loads(row.sampling) == {"temperature": 0.3, "top_p": 1.0, "max_tokens": 9, "seed": seed}
    assert len({body["seed"] for body in server.requests}) == 15
    assert [body.get("n") for body in server.requests] == [3] + 14 * [None]
    assert engine.note == "ignores n, so it was asked one by one, gives no log-probs"


def test_a_server_that_honours_n_is_asked_once_for_each_prompt(serve: Serve) -> None:
    server = serve(lambda n, body: costly(body, 10, 40))
    engine = OpenAITeacher(config(server.url, concurrency=1))
    rows = [row for batch in engine.run(asks(5, samples=4), frozenset({("id0", 1)})) for row in batch]
    assert sorted(body.get("n", 1) for body in server.requests) == [3, 4, 4, 4, 4]
    assert {(r.prompt_id, r.sample) for r in rows} == {(f"id{i}", s) for i in range(5) for s in range(4)} - {("id0", 1)}
    told = [json.loads(r.sampling) for r in rows if isinstance(r, Sample)]
    assert sum("usage" in t for t in told) == 5
    assert {t["n"] for t in told} == {3, 4}
    assert engine.note == "honours n, gives no log-probs; 50 prompt and 200 completion tokens"


def test_many_samples_are_asked_for_in_requests_of_eight(serve: Serve) -> None:
    server = serve(lambda n, body: costly(body, 1, 1))
    assert len(got(server.url, asks(1, samples=20), concurrency=1)) == 20
    assert [body["n"] for body in server.requests] == [8, 8, 4]


@pytest.mark.parametrize("unknown", ["n", "logprobs"])
def test_a_server_that_refuses_a_parameter_is_asked_without_it(serve: Serve, unknown: str) -> None:
    def strict(n: int, body: dict[str, Any]) -> Answer:
        return refusal(400, f"unknown parameter {unknown}") if unknown in body else costly(body, 1, 1)

    server = serve(strict)
    engine = OpenAITeacher(config(server.url, concurrency=1, retries=0))
    rows = [row for batch in engine.run(asks(3, samples=2), frozenset()) for row in batch]
    assert [type(r) for r in rows] == [Sample] * 6
    assert len(server.requests) == 7
    assert engine.note.startswith("ignores n, so it was asked one by one, gives no log-probs")


def test_log_probs_are_asked_for_once_and_noted(serve: Serve) -> None:
    server = serve(lambda n, body: choices([choice() | {"logprobs": {"content": [{"logprob": -1.0}]}}]))
    engine = OpenAITeacher(config(server.url))
    assert sum(len(batch) for batch in engine.run(asks(9), frozenset())) == 9
    assert sum("logprobs" in body for body in server.requests) == 1
    assert engine.note == "gives log-probs"


def test_a_server_whose_usage_leaves_choices_out_is_asked_one_by_one(serve: Serve) -> None:
    def undercounts(n: int, body: dict[str, Any]) -> Answer:
        more = {"logprobs": {"content": 7 * [{"logprob": -1.0}]}} if "logprobs" in body else {}
        usage = {"prompt_tokens": 1, "completion_tokens": 7}
        return choices([choice() | more for _ in range(body.get("n", 1))], usage=usage)

    server = serve(undercounts)
    engine = OpenAITeacher(config(server.url, concurrency=1))
    assert sum(len(batch) for batch in engine.run(asks(3, samples=3), frozenset())) == 9
    assert [body.get("n") for body in server.requests] == [3] + 6 * [None]
    told = "counts the tokens of one answer where n were given, so it was asked one by one, gives log-probs; "
    assert engine.note.startswith(told)


def test_of_several_choices_the_bad_ones_are_asked_for_again(serve: Serve) -> None:
    def half(n: int, body: dict[str, Any]) -> Answer:
        return choices([choice("good"), choice("", "content_filter")][: body.get("n", 1)])

    rows = got(serve(half).url, asks(1, samples=2))
    assert [r.text for r in rows if isinstance(r, Sample)] == ["good", "good"]


# ---------------------------------------------------------------- a budget
@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"tokens": 100}, "budget.tokens = 100 is used up (120 completion tokens so far)"),
        ({"cost": 0.05, "input_price": 200.0, "output_price": 400.0}, "budget.cost = 0.05 is used up (0.066 so far)"),
    ],
)
def test_no_request_begins_after_the_budget_is_used_up_and_the_next_run_counts_on(
    serve: Serve, budget: dict[str, Any], told: str
) -> None:
    server = serve(lambda n, body: costly(body, 30, 40))
    rows, said = failed(server.url, asks(10), concurrency=1, budget=budget)
    assert f"teacher 't': {told}. Finished rows are kept. Raise it, then run the same command again" in said
    assert len(rows) == len(server.requests) == 3
    more = {key: value * (2 if key in ("tokens", "cost") else 1) for key, value in budget.items()}
    done = frozenset((r.prompt_id, r.sample) for r in rows)
    rows, _ = failed(server.url, asks(10), done, Usage(90, 120), concurrency=1, budget=more)
    assert len(rows) == 2
    assert len(server.requests) == 5


def test_requests_under_way_when_the_budget_is_reached_are_waited_for(serve: Serve) -> None:
    def slow(n: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.05 * n)
        return costly(body, 1, 100)

    server = serve(slow)
    rows, _ = failed(server.url, asks(50), concurrency=4, budget={"tokens": 100})
    assert len(rows) == len(server.requests) == 4


def test_a_budget_that_covers_the_work_is_not_reached(serve: Serve) -> None:
    server = serve(lambda n, body: costly(body, 1, 10))
    assert len(got(server.url, asks(10), concurrency=1, budget={"tokens": 100})) == 10


def test_a_budget_needs_a_server_that_says_what_it_used(serve: Serve) -> None:
    rows, said = failed(serve(lambda n, body: chat()).url, asks(10), concurrency=1, budget={"tokens": 100})
    assert len(rows) == 1
    assert "does not report `usage`, so the budget cannot be kept. Finished rows are kept. Remove `budget`" in said


def test_what_stored_rows_used_up_is_summed_over_their_requests(tmp_path: Path) -> None:
    row = {"trace_id": "", "prompt_id": "p", "teacher": "t", "text": "x", "finish_reason": "stop", "model": "m"}
    part = partition(tmp_path, "traces", {"teacher": "t"})
    said = [
        {"usage": {"prompt_tokens": 5, "completion_tokens": 7}},
        {"n": 2},
        {"usage": {"prompt_tokens": 1, "completion_tokens": 2}},
    ]
    for i, sampling in enumerate(said):
        rows = [{**row, "trace_id": str(i), "sample": i, "sampling": json.dumps(sampling)}]
        part.write(pa.Table.from_pylist(rows, schema=ARROW["traces"]), "f")
    assert stored_usage(part.loose("f")) == Usage(6, 9)


@pytest.mark.parametrize("budget", [{}, {"cost": 1.0}, {"input_price": 1.0, "tokens": 5}, {"cost": 1.0, "input_price": 1.0}])
def test_a_budget_that_cannot_be_held_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cost, input_price and output_price|expected tokens"):
        config("http://127.0.0.1:9/v1", budget=budget)


# ---------------------------------------------------------------- which requests
def test_finished_samples_are_not_asked_for_again(serve: Serve) -> None:
    server = serve(lambda n, body: chat())
    rows = got(server.url, asks(3, samples=2), frozenset({("id0", 0), ("id2", 1)}))
    assert [(r.prompt_id, r.sample) for r in rows] == [("id0", 1), ("id1", 0), ("id1", 1), ("id2", 0)]
    assert len(server.requests) == 4
    assert got("http://127.0.0.1:9/v1", asks(1), frozenset({("id0", 0)})) == []


def test_a_system_message_of_the_teacher_stands_in_for_the_prompts(serve: Serve) -> None:
    server = serve(lambda n, body: chat())
    work = [Ask("id", [{"role": "system", "content": "old"}, {"role": "user", "content": "p"}], (0,), 0, "42", {})]
    got(server.url, work, system="new")
    assert server.requests[0]["messages"] == [{"role": "system", "content": "new"}, {"role": "user", "content": "p"}]
    got(server.url, work)
    assert server.requests[1]["messages"] == work[0].messages


def test_requests_run_at_once_up_to_the_concurrency_and_come_in_lists(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FLUSH_ROWS", 4)
    running: list[int] = []
    most: list[int] = []

    def slow(n: int, body: dict[str, Any]) -> Answer:
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        return chat()

    server = serve(slow)
    batches = list(OpenAITeacher(config(server.url, concurrency=4)).run(asks(10), frozenset()))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert 2 <= max(most) <= 4


def test_a_slow_server_is_flushed_by_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FLUSH_S", 0.1)

    def slow(n: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.2)
        return chat()

    server = serve(slow)
    assert [len(b) for b in OpenAITeacher(config(server.url, concurrency=1)).run(asks(3), frozenset())] == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "finish", "text"),
    [
        (chat("t", "length"), "length", "t"),
        (chat("t", "eos"), "stop", "t"),
        (chat("\n\nt", reasoning_content="\nhm\n"), "stop", "<think>\nhm\n</think>\n\nt"),
        (chat("t", reasoning="hm"), "stop", "<think>\nhm\n</think>\n\nt"),
        (chat("<think>\nhm\n</think>t", reasoning_content="hm"), "stop", "<think>\nhm\n</think>t"),
        (chat("half \ud83d"), "stop", "half \ufffd"),
    ],
)
def test_finish_reasons_and_reasoning_become_part_of_the_row(serve: Serve, answer: Answer, finish: str, text: str) -> None:
    (row,) = got(serve(lambda n, body: answer).url, asks(1))
    assert isinstance(row, Sample)
    assert (row.finish_reason, row.text) == (finish, text)


def test_a_server_that_wants_max_completion_tokens_gets_them(serve: Serve) -> None:
    def newer(n: int, body: dict[str, Any]) -> Answer:
        if "max_tokens" in body:
            return refusal(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return chat(str(body["max_completion_tokens"]))

    rows = got(serve(newer).url, asks(3), retries=0, max_tokens=9)
    assert [r.text for r in rows if isinstance(r, Sample)] == ["9", "9", "9"]


# ---------------------------------------------------------------- a server with trouble
GARBAGE = [
    (200, {}, b"<html>busy</html>"),
    (200, {"Content-Type": "text/html"}, b"hello"),
    (200, {}, b"[1, 2]"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"finish_reason": "stop"}]}'),
    (200, {}, b'{"choices": ["x"]}'),
    (200, {}, b""),
    chat(""),
    chat(None),
    chat([{"type": "text"}]),
    chat("t", None),
]


@pytest.mark.parametrize("trouble", [refusal(429), refusal(500), refusal(503), refusal(408), None, *GARBAGE])
def test_trouble_is_retried_until_it_is_over(serve: Serve, trouble: Answer | None) -> None:
    server = serve(lambda n, body: chat() if n in (0, 3) else trouble)
    (row,) = got(server.url, asks(1))  # the server is known to be up
    assert isinstance(row, Sample)
    (row,) = got(server.url, [Ask("x", [{"role": "user", "content": "p"}], (0,), 0, "", {})])
    assert isinstance(row, Sample)
    assert len(server.requests) == 4
    assert len({body["seed"] for body in server.requests[1:]}) == 1


@pytest.mark.parametrize(
    ("trouble", "why", "requests"),
    [
        (refusal(500, "out of memory"), "status 500: out of memory (3 attempts)", 3),
        (refusal(429, f"slow down, {KEY}"), "status 429: slow down, *** (3 attempts)", 3),
        ((200, {}, b"<html>"), "garbage: expected JSON, found b'<html>' (3 attempts)", 3),
        ((200, {}, b'{"error": "x"}'), "garbage: expected choices with a message", 3),
        (chat(""), "garbage: expected a text, found an empty one (3 attempts)", 3),
        (chat(None), "garbage: expected a text, found None", 3),
        (chat("t", None), "garbage: expected a finish_reason, found None", 3),
        (refusal(400, "the prompt is too long"), "status 400: the prompt is too long", 1),
        (chat("t", "content_filter"), "finish_reason 'content_filter', expected stop or length", 1),
        (chat("", "length", reasoning_content="hm"), "max_tokens ended the reasoning before any answer", 1),
    ],
)
def test_trouble_that_stays_is_a_failure_of_that_sample_alone(
    serve: Serve, trouble: Answer, why: str, requests: int
) -> None:
    server = serve(lambda n, body: trouble if body["messages"][-1]["content"] == "p1" else chat())
    rows = got(server.url, asks(3), concurrency=1)
    assert [type(r) for r in rows] == [Sample, Failure, Sample]
    failure = rows[1]
    assert isinstance(failure, Failure)
    assert why in failure.why
    assert len(server.requests) == requests + 2


def test_a_server_too_slow_for_the_timeout_fails_the_sample(serve: Serve) -> None:
    def slow(n: int, body: dict[str, Any]) -> Answer:
        time.sleep(2)
        return chat()

    rows = got(serve(slow).url, asks(1), timeout_s=0.2, retries=1)
    assert rows == [Failure("id0", 0, "no answer within 0.2 s (2 attempts)")]


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_obeyed(serve: Serve, dated: bool) -> None:
    after = email.utils.formatdate(time.time() + 2, usegmt=True) if dated else "0.4"
    server = serve(lambda n, body: chat() if n else refusal(429, **{"Retry-After": after}))
    (row,) = got(server.url, asks(1))
    assert isinstance(row, Sample)
    assert server.times[1] - server.times[0] >= 0.35


def test_retry_after_holds_back_every_request_and_has_a_bound(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_RETRY_AFTER_S", 0.5)
    server = serve(lambda n, body: chat() if n else refusal(429, **{"Retry-After": "86400"}))
    assert [type(r) for r in got(server.url, asks(6), concurrency=1, retries=1)] == [Sample] * 6
    assert 0.45 <= server.times[1] - server.times[0] < 5
    waits = serve(lambda n, body: chat() if n > 1 else refusal(429, **{"Retry-After": "86400"}))
    got(waits.url, asks(6), concurrency=2)
    assert all(t - waits.times[1] >= 0.45 for t in waits.times[2:])
    assert len(waits.times) == 8


def test_repeats_are_spread_by_chance(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BACKOFF_S", 0.2)
    server = serve(lambda n, body: refusal(429) if n < 8 else chat())
    got(server.url, asks(8), concurrency=8)
    again = sorted(t - max(server.times[:8]) for t in server.times[8:])
    assert again[-1] - again[0] > 0.02
    assert 0.05 < again[0] < again[-1] < 0.6


def test_a_reply_that_is_cut_off_is_asked_for_again(serve: Serve) -> None:
    whole = chat("x" * 1000)
    half = (200, {"X-Cut": "yes"}, whole[2])
    for trouble in (half, (200, {}, whole[2][:500])):
        server = serve(lambda n, body, trouble=trouble: trouble if n == 0 else whole)
        (row,) = got(server.url, asks(1))
        assert isinstance(row, Sample)
        assert len(server.requests) == 2


# ---------------------------------------------------------------- a server that is not there
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_server_that_is_down_ends_the_work_at_once_with_one_clear_line() -> None:
    url = f"http://127.0.0.1:{closed_port()}/v1"
    started = time.monotonic()
    rows, said = failed(url, asks(100), retries=50)
    assert rows == []
    assert time.monotonic() - started < 20
    assert f"teacher 't': no server answers at {url} (tried 3 times: connection failed" in said
    assert "Finished rows are kept. Start the server or correct base_url" in said
    assert "\n" not in said


def test_a_server_that_dies_midway_keeps_what_it_had_given(serve: Serve) -> None:
    server = serve(lambda n, body: chat() if n < 20 else None)
    rows, said = failed(server.url, asks(100), retries=1, concurrency=4)
    assert sum(isinstance(r, Sample) for r in rows) == 20
    assert sum(isinstance(r, Failure) for r in rows) <= 16 + 4
    assert "16 requests failed in a row, the last with: connection failed" in said
    assert "Finished rows are kept" in said


def test_refusals_for_content_do_not_count_as_a_broken_server(serve: Serve) -> None:
    rows = got(serve(lambda n, body: chat("t", "content_filter")).url, asks(40))
    assert [type(r) for r in rows] == [Failure] * 40


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_work_and_names_the_variable_but_never_the_key(
    serve: Serve, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by_server = [None, f"Incorrect API key provided: {KEY}", "No API key"]
    server = serve(lambda n, body: refusal(status, said_by_server[n] or "") if n else chat())
    rows, said = failed(server.url, asks(50), concurrency=1)
    assert [type(r) for r in rows] == [Sample]
    assert f"{server.url} refuses the key (status {status}: Incorrect API key provided: ***)" in said
    assert "TEACHER_KEY is set, so it may be the wrong key" in said
    assert len(server.requests) == 2
    monkeypatch.delenv("TEACHER_KEY")
    _, said = failed(server.url, asks(1))
    assert "The environment variable TEACHER_KEY is not set; set it, or name another in api_key_env" in said


def test_an_unknown_model_ends_the_work_and_says_which_there_are(serve: Serve) -> None:
    server = serve(lambda n, body: refusal(404, "The model `m` does not exist."))
    _, said = failed(server.url, asks(5))
    assert f"{server.url} does not know model 'm'" in said
    assert "It has: served-model." in said
    _, said = failed(server.url.removesuffix("/v1"), asks(1))
    assert "no such path" in said
    assert "Correct model or base_url (which mostly ends in /v1)" in said


# ---------------------------------------------------------------- stopping
def test_a_caller_that_stops_ends_the_requests(serve: Serve) -> None:
    def slow(n: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.05 if n < 4 else 20)
        return chat()

    server = serve(slow)
    engine = OpenAITeacher(config(server.url, concurrency=4))
    started = time.monotonic()
    rows = engine.run(asks(1000), frozenset())
    engine_module.FLUSH_S, before = 0.1, engine_module.FLUSH_S
    try:
        assert next(rows)
        rows.close()  # type: ignore[attr-defined]
    finally:
        engine_module.FLUSH_S = before
    assert time.monotonic() - started < 15
    asked = len(server.requests)
    time.sleep(0.5)
    settled = len(server.requests)
    assert settled <= asked + 4 < 24, "only what was on its way when it stopped"
    time.sleep(0.5)
    assert len(server.requests) == settled
    assert not any(t.name == "openai-teacher" for t in threading.enumerate())


def test_ctrl_c_hands_over_what_is_finished_and_stops_promptly(serve: Serve, tmp_path: Path) -> None:
    def slow(n: int, body: dict[str, Any]) -> Answer:
        if n >= 3:
            time.sleep(30)
        return chat()

    server = serve(slow)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        from pipeline.engines.base import Ask
        from pipeline.engines.openai import OpenAITeacher
        from schemas.recipe import OpenAIEngine
        config = OpenAIEngine(type="openai", base_url="{server.url}", model="m", concurrency=2)
        work = [Ask(f"id{{i}}", [{{"role": "user", "content": "p"}}], (0,), i, "", {{}}) for i in range(50)]
        try:
            for batch in OpenAITeacher(config).run(work, frozenset()):
                print(len(batch), flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(Path(engine_module.__file__).parents[2])}
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 60
    while len(server.requests) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, _ = child.communicate(timeout=20)
    *sizes, last = out.split()
    assert (sum(map(int, sizes)), last) == (3, "interrupted")
    assert time.monotonic() - sent < 15

    # ---------------------------------------------------------------- settings


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"teacher 't': .*pip install dypo\[openai\]"):
        OpenAITeacher(config("http://127.0.0.1:9/v1"), "teacher 't'")


def test_a_server_has_no_content_id() -> None:
    it = Teacher.model_validate({"name": "t", "engine": config("http://127.0.0.1:9/v1").model_dump()})
    assert content_id(it) is None
    assert teacher_engine(it).name == "openai"
