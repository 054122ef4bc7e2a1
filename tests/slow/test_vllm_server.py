"""A real vLLM server (the CPU build) as the engine: reloaded for each policy, and held against the policy's plain forward."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.engines.base import Ask, Sample, Sampling
from pipeline.engines.vllm_server import VLLMServerSampler
from pipeline.policy import Renderer, policy_id
from schemas.errors import WorkError
from schemas.recipe import Policy, VLLMServerEngine
from tests.slow.test_vllm import forward_of, save_policy
from tests.vllm_server import vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]

SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=24)
LONG = "+".join(["12"] * 60)  # the prefix cache keeps whole blocks, 128 tokens on a CPU


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies of one shape."""
    path = tmp_path_factory.mktemp("policies")
    return {f"untied{seed}": save_policy(path / f"untied{seed}", seed, tied=False, context=512) for seed in (0, 1)}


@pytest.fixture(scope="module")
def server(policies: dict[str, Path]) -> Iterator[str]:
    pytest.importorskip("vllm", reason="needs the second environment: make venv-vllm")
    with vllm_server(policies["untied0"], 512) as address:
        yield address


def sample(address: str, folder: Path) -> list[Sample]:
    """Samples, and holds the rows against the policy's plain forward."""
    renderer, reference = Renderer(folder), forward_of(folder)
    work = [
        Ask(f"p{n}", [], (0, 1, 2, 3), 100 + n, "", {}, renderer.prompt_tokens([{"role": "user", "content": text}]))
        for n, text in enumerate((LONG, LONG[3:], "8+46"))
    ]
    config = VLLMServerEngine.model_validate({"type": "vllm_server", "base_url": address, "retries": 0, "timeout_s": 120})
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    engine = VLLMServerSampler(folder, policy_id(folder), policy, config, SAMPLING, renderer, reference)
    prompts = {ask.prompt_id: ask.prompt_tokens or [] for ask in work}
    rows: list[Sample] = []
    for row in (row for rows in engine.run(work, frozenset()) for row in rows):
        assert isinstance(row, Sample), row
        expected = reference(prompts[row.prompt_id], row.tokens or [], 0.7)
        assert max(abs(a - b) for a, b in zip(expected, row.logprobs or [], strict=True)) < 1e-3
        assert ((row.tokens or [])[-1] == 2) == (row.finish_reason == "stop")
        rows.append(row)
    assert len(rows) == 12
    return rows


def tokens(rows: list[Sample]) -> list[list[int] | None]:
    return [row.tokens for row in rows]


def test_each_policy_is_loaded_before_it_is_sampled_and_the_same_seed_gives_the_same_rows(
    server: str, policies: dict[str, Path]
) -> None:
    first = sample(server, policies["untied0"])
    second = sample(server, policies["untied1"])
    assert tokens(first) != tokens(second)
    assert tokens(sample(server, policies["untied0"])) == tokens(first)


def test_weights_that_end_the_server_are_a_clear_error(server: str, policies: dict[str, Path], tmp_path: Path) -> None:
    other = save_policy(tmp_path / "other", 3, tied=False, context=512)
    (other / "model.safetensors").write_bytes(b"not a safetensors file")  # vLLM 0.32 ends itself over it
    with pytest.raises(WorkError, match=r"collective_rpc|no answer.*Finished rows are kept"):
        sample_with_reference_of(server, other, policies["untied0"])


def sample_with_reference_of(address: str, folder: Path, other: Path) -> None:
    renderer = Renderer(other)
    ask = Ask("p", [], (0,), 1, "", {}, renderer.prompt_tokens([{"role": "user", "content": "8+46"}]))
    config = VLLMServerEngine.model_validate({"type": "vllm_server", "base_url": address, "retries": 0})
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    engine = VLLMServerSampler(folder, policy_id(folder), policy, config, SAMPLING, renderer, forward_of(other))
    list(engine.run([ask], frozenset()))
