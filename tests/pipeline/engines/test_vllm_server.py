"""The client of a vLLM server against a server on loopback that speaks vLLM's protocol over a real tiny model.

tests/slow/test_vllm_server.py does the same with vLLM itself; this one can also misbehave.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engines.base import Failure, Sample, Sampling
from pipeline.engines.vllm_server import VLLMServerSampler
from pipeline.policy import Renderer, policy_id
from schemas.errors import UserError, WorkError
from schemas.recipe import Policy, VLLMServerEngine
from tests.pipeline.engines.test_hf import EOS, forward, make_asks, save

SAMPLING = Sampling(0.7, 1.0, 6)


class Server(ThreadingHTTPServer):
    """Serves the weights of `folder`; what it does wrong is set by the test."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = self.folder = folder
        self.version = "default"
        self.calls: list[str] = []
        self.dev_mode, self.reloads, self.resets, self.failures = True, True, True, 0
        self.restart_after: int | None = None  # completions
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card = {"id": "policy", "object": "model", "root": str(self.server.root), "max_model_len": 40}
            return self._answer(200, {"object": "list", "data": [card]})
        self._dev({"weight_version": self.server.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path == "/v1/completions":
            with self.server.lock:
                return self._complete(body)
        self.server.calls.append(self.path.split("?")[0])
        if self.path == "/collective_rpc" and self.server.reloads:
            self.server.folder = Path(body["kwargs"]["weights_path"])
        if self.path == "/reset_prefix_cache":
            return self._dev({"success": self.server.resets})
        if self.path == "/update_weight_version":
            self.server.version = body["new_version"]
        self._dev({})

    def _complete(self, body: dict[str, Any]) -> None:
        if self.server.failures:
            self.server.failures -= 1
            return self._answer(503, {"error": {"message": "busy"}})
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        assert body["stop_token_ids"] == [EOS]
        noise = torch.Generator().manual_seed(body["seed"] % 2**63)
        tokens, logprobs = [], []
        while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] != EOS):
            logits = forward(self.server.folder, body["prompt"], [*tokens, 0])[-1]
            logps = (logits / body["temperature"]).log_softmax(-1)
            tokens.append(int(torch.multinomial(logps.exp(), 1, generator=noise)))
            logprobs.append(logps[tokens[-1]].item())
        choice = {
            "index": 0, "text": "", "finish_reason": "stop" if tokens[-1] == EOS else "length", "token_ids": tokens,
            "logprobs": {"token_logprobs": logprobs, "tokens": [""] * len(tokens), "top_logprobs": [], "text_offset": []},
        }  # fmt: skip
        if self.server.restart_after is not None:
            self.server.restart_after -= 1
            if self.server.restart_after == 0:
                self.server.version, self.server.folder = "default", self.server.root
        answer = {"id": "c", "object": "text_completion", "created": 0, "model": "policy", "choices": [choice]}
        self._answer(200, answer)

    def _dev(self, answer: dict[str, Any]) -> None:
        self._answer(200, answer) if self.server.dev_mode else self._answer(404, {"detail": "Not Found"})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("policies")
    return [save(path / "a"), save(path / "b", initializer_range=0.31)]


@pytest.fixture
def server(folders: list[Path]) -> Iterator[Server]:
    it = Server(folders[0])
    thread = threading.Thread(target=it.serve_forever, daemon=True)
    thread.start()
    yield it
    it.shutdown()
    it.server_close()


def sampler(server: Server, folder: Path, **settings: Any) -> VLLMServerSampler:
    config = VLLMServerEngine.model_validate({"type": "vllm_server", "base_url": server.url, "retries": 3, **settings})
    policy = Policy.model_validate({"model": folder, "device": "cpu"})

    def reference(prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
        logps = (forward(folder, prompt, tokens) / temperature).log_softmax(-1)
        return logps[range(len(tokens)), tokens].tolist()

    return VLLMServerSampler(folder, policy_id(folder), policy, config, SAMPLING, Renderer(folder), reference)


def rows(server: Server, folder: Path, **settings: Any) -> dict[tuple[str, int], Sample]:
    """All rows, each held against the policy's plain forward."""
    asks = make_asks(folder, k=2)
    prompts = {ask.prompt_id: ask.prompt_tokens or [] for ask in asks}
    found = {}
    for row in (row for part in sampler(server, folder, **settings).run(asks, frozenset()) for row in part):
        assert isinstance(row, Sample)
        tokens = row.tokens or []
        expected = (forward(folder, prompts[row.prompt_id], tokens) / 0.7).log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-5)
        found[row.prompt_id, row.sample] = row
    assert len(found) == 10
    return found


def test_a_server_started_on_the_policy_is_not_reloaded(server: Server, folders: list[Path]) -> None:
    rows(server, folders[0])
    assert server.calls == []


def test_another_policy_is_loaded_once_and_its_prefix_cache_dropped(server: Server, folders: list[Path]) -> None:
    first = rows(server, folders[1])
    assert server.calls == [
        "/pause", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume",
    ]  # fmt: skip
    assert server.version == policy_id(folders[1])
    assert rows(server, folders[1]) == first
    assert len(server.calls) == 6
    rows(server, folders[0])
    assert len(server.calls) == 12, "the server's first policy again, which its root alone no longer says"


def test_weights_that_are_not_the_policys_are_refused_before_sampling(server: Server, folders: list[Path]) -> None:
    server.reloads = False  # it says that it did
    with pytest.raises(WorkError, match=r"refused to sample.*expected the reference's within 0\.002"):
        rows(server, folders[1])


def test_a_prefix_cache_that_was_not_reset_is_refused(server: Server, folders: list[Path]) -> None:
    server.resets = False
    with pytest.raises(WorkError, match="prefix cache was not reset"):
        rows(server, folders[1])
    assert server.calls[-1] == "/resume"


def test_rows_of_a_server_that_restarted_on_another_folder_are_not_kept(server: Server, folders: list[Path]) -> None:
    running = sampler(server, folders[0], batch_sequences=4).run(make_asks(folders[0], k=2), frozenset())
    next(running)
    server.root = server.folder = folders[1]  # its weight version is "default" again, as it was
    with pytest.raises(WorkError, match="restarted, or reloaded by somebody else"):
        next(running)


def test_rows_of_a_server_that_restarted_meanwhile_are_not_kept(server: Server, folders: list[Path]) -> None:
    server.restart_after = 4 + 7  # 4 of the probe, then in the second batch of 4
    running = sampler(server, folders[1], batch_sequences=4, concurrency=1).run(make_asks(folders[1], k=2), frozenset())
    assert len(next(running)) == 4
    with pytest.raises(WorkError, match=r"restarted, or reloaded by somebody else.*The last 4 rows were not kept"):
        next(running)


def test_finished_samples_are_not_asked_for_and_the_others_do_not_change(server: Server, folders: list[Path]) -> None:
    whole = rows(server, folders[0])
    done = frozenset(key for key in whole if key[0] != "p2")
    left = [row for part in sampler(server, folders[0]).run(make_asks(folders[0], k=2), done) for row in part]
    assert [row for row in left if isinstance(row, Sample)] == [row for key, row in whole.items() if key not in done]


def test_a_busy_server_is_asked_again(server: Server, folders: list[Path]) -> None:
    server.failures = 2
    rows(server, folders[0])


def test_a_prompt_too_long_for_the_server_fails_alone(server: Server, folders: list[Path]) -> None:
    asks = make_asks(folders[0], k=1, texts=("8", "9" * 50))
    found = [row for part in sampler(server, folders[0]).run(asks, frozenset()) for row in part]
    assert [type(row) for row in found] == [Sample, Failure]
    assert "max_model_len 40" in found[1].why  # pyright: ignore[reportAttributeAccessIssue]


def test_a_server_without_dev_mode_is_refused_with_the_way_out(server: Server, folders: list[Path]) -> None:
    server.dev_mode = False
    with pytest.raises(UserError, match=r"VLLM_SERVER_DEV_MODE=1"):
        rows(server, folders[0])


def test_no_server_is_a_clear_error(folders: list[Path], server: Server) -> None:
    nowhere = Server(folders[0])
    nowhere.server_close()
    with pytest.raises(WorkError, match=r"no answer.*start the server and run the same command again"):
        rows(nowhere, folders[0], retries=0)
