"""A vLLM engine that outlives a policy: reloaded in place, and never sampled from with weights that are not the policy's.

What is known to go wrong in silence (vLLM's CPU build, 0.32): tied embeddings keep the old head, and a prefix cache that is not
reset answers from the old policy's keys and values. Both have to end in a new engine and in the new policy's rows.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import vllm
from pipeline.engines.base import Ask, Sample, Sampling
from pipeline.policy import Renderer
from schemas.errors import WorkError
from schemas.recipe import Policy, VLLMEngine
from tests.slow.test_vllm import forward_of, save_policy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=24)
LONG = "+".join(["12"] * 60)  # the prefix cache keeps whole blocks, 128 tokens on a CPU


@pytest.fixture(autouse=True)
def _needs_vllm() -> Iterator[None]:
    pytest.importorskip("vllm", reason="needs the second environment: make venv-vllm")
    vllm.shut_down()
    yield
    vllm.shut_down()


def sampler(folder: Path, batch: int = 64) -> vllm.VLLMSampler:
    config = VLLMEngine.model_validate({"type": "vllm", "enforce_eager": True, "batch_sequences": batch})
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    return vllm.VLLMSampler(folder, policy, config, SAMPLING, Renderer(folder), forward_of(folder))


def asks(folder: Path, texts: tuple[str, ...] = (LONG, LONG[3:], "8+46")) -> list[Ask]:
    renderer = Renderer(folder)
    return [
        Ask(f"p{n}", [], (0, 1, 2, 3), 100 + n, "", {}, renderer.prompt_tokens([{"role": "user", "content": text}]))
        for n, text in enumerate(texts)
    ]


def sample(folder: Path) -> Any:
    """Samples, holds the rows against the policy's plain forward, and returns the engine that made them."""
    work = asks(folder)
    reference, prompts = forward_of(folder), {ask.prompt_id: ask.prompt_tokens or [] for ask in work}
    rows = [row for rows in sampler(folder).run(work, frozenset()) for row in rows]
    assert len(rows) == 12
    for row in rows:
        assert isinstance(row, Sample)
        expected = reference(prompts[row.prompt_id], row.tokens or [], 1.0)
        assert max(abs(a - b) for a, b in zip(expected, row.logprobs or [], strict=True)) < 1e-3
    assert vllm._live is not None
    return vllm._live.llm


def test_the_next_policy_is_loaded_into_the_same_engine(tmp_path: Path) -> None:
    first, second = (save_policy(tmp_path / str(seed), seed, tied=False, context=512) for seed in (0, 1))
    engine = sample(first)
    assert sample(first) is engine, "the same policy again started a new engine"
    assert sample(second) is engine
    assert sample(first) is engine


def test_tied_embeddings_that_reload_wrongly_end_in_a_new_engine(tmp_path: Path) -> None:
    first, second = (save_policy(tmp_path / str(seed), seed, tied=True, context=512) for seed in (0, 1))
    engine = sample(first)
    assert sample(second) is not engine


def test_a_prefix_cache_of_the_old_policy_ends_in_a_new_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (save_policy(tmp_path / str(seed), seed, tied=False, context=512) for seed in (0, 1))
    engine = sample(first)
    monkeypatch.setattr(type(engine), "reset_prefix_cache", lambda self: True)
    assert sample(second) is not engine


def test_another_shape_starts_a_new_engine(tmp_path: Path) -> None:
    first, longer = (
        save_policy(tmp_path / "a", tied=False, context=512),
        save_policy(tmp_path / "b", tied=False, context=640),
    )
    assert sample(first) is not sample(longer)


def test_an_engine_that_dies_keeps_the_finished_rows_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", tied=False, context=512)
    work = asks(folder)
    running = sampler(folder, batch=4).run(work, frozenset())
    rows = next(running)
    assert vllm._live is not None
    for child in _children(os.getpid()):
        os.kill(child, signal.SIGKILL)
    with pytest.raises(WorkError, match=r"engine died.*Finished rows are kept"):
        list(running)
    assert vllm._live is None
    done = frozenset((row.prompt_id, row.sample) for row in rows)
    again = [row for rows in sampler(folder, batch=4).run(work, done) for row in rows]
    assert {(row.prompt_id, row.sample) for row in again} == {(a.prompt_id, s) for a in work for s in a.samples} - done


def _children(pid: int) -> list[int]:
    """Processes of vLLM's engine: all that descend from this one."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "multiprocessing.resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text():
            found += [int(child), *_children(int(child))]
    return found
