"""vLLM's CPU build as an engine, against an independent forward. Runs in the second environment (`make venv-vllm`).

An engine takes up to minutes to start, so one work list is sampled once and the tests read its rows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.engines.base import Ask, Failure, Sample, Sampling
from pipeline.engines.hf import HFSampler
from pipeline.engines.vllm import VLLMSampler
from pipeline.policy import Renderer
from schemas.errors import WorkError
from schemas.recipe import HFEngine, Policy, VLLMEngine
from tests.tiny_runs import ROOT, dypo, table, write_recipe

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]

CHARS = "_^.0123456789+-=>:!"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}={% endfor %}"
SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=24)


class Run(NamedTuple):
    rows: list[Sample]  # of `asks`, and of a twin of p1 with the same seed and half of its samples finished already
    asks: list[Ask]
    hf: list[Sample]
    probed: float
    refusal: str


def save_policy(path: Path, seed: int = 0, *, tied: bool = True, context: int = 128) -> Path:
    """A random policy over the tiny alphabet."""
    torch = pytest.importorskip("torch")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=context, initializer_range=0.2, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARS)}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="_", bos_token="^", eos_token=".")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def forward_of(folder: Path) -> Any:
    """(prompt_tokens, tokens, temperature) -> log-probs, by transformers' plain forward."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def reference(prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        return [logps[t, token].item() for t, token in enumerate(tokens)]

    return reference


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    pytest.importorskip("vllm", reason="needs the second environment: make venv-vllm")
    reference = forward_of(folder)

    def at_another_temperature(prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
        return reference(prompt, tokens, temperature * 1.5)

    renderer = Renderer(folder)
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    config = VLLMEngine.model_validate({"type": "vllm", "enforce_eager": True, "max_logprob_difference": 1e-3})
    texts = ["8+46", "1+2+3", "9", "77+15+20"]
    asks = [
        Ask(f"p{n}", [], tuple(range(6)), 100 + n, "", {}, renderer.prompt_tokens([{"role": "user", "content": text}]))
        for n, text in enumerate(texts)
    ]
    engine = VLLMSampler(folder, policy, config, SAMPLING, renderer, reference)
    twin = replace(asks[1], prompt_id="twin")
    rows = _rows(engine.run([*asks, twin], frozenset(("twin", sample) for sample in (0, 1, 3))))
    wrong = VLLMSampler(folder, policy, config, SAMPLING, renderer, at_another_temperature)
    with pytest.raises(WorkError) as refusal:
        list(wrong.run(asks, frozenset()))
    hf = _rows(HFSampler(folder, policy, HFEngine.model_validate({}), SAMPLING, renderer).run(asks, frozenset()))
    assert engine.probed is not None
    return Run(rows, asks, hf, engine.probed, str(refusal.value))


def _rows(lists: Any) -> list[Sample]:
    rows = [row for part in lists for row in part]
    assert not [row for row in rows if isinstance(row, Failure)]
    return sorted(rows, key=lambda row: (row.prompt_id, row.sample))


def test_rows_have_the_shape_of_hf_rows(run: Run) -> None:
    assert [(r.prompt_id, r.sample) for r in run.rows if r.prompt_id != "twin"] == [(r.prompt_id, r.sample) for r in run.hf]
    for row in run.rows:
        assert row.tokens is not None
        assert row.logprobs is not None
        assert len(row.tokens) == len(row.logprobs) <= SAMPLING.max_tokens
        assert (row.tokens[-1] == 2) == (row.finish_reason == "stop")
        assert 2 not in row.tokens[:-1]
        assert row.finish_reason == "stop" or len(row.tokens) == SAMPLING.max_tokens
        assert "." not in row.text
    assert {r.finish_reason for r in run.rows} <= {"stop", "length"}


def test_samples_of_a_group_differ(run: Run) -> None:
    for ask in run.asks:
        assert len({tuple(r.tokens or ()) for r in run.rows if r.prompt_id == ask.prompt_id}) > 1


def test_log_probs_are_at_the_sampling_temperature_over_the_whole_vocabulary(run: Run, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    prompts = {ask.prompt_id: ask.prompt_tokens or [] for ask in [*run.asks, replace(run.asks[1], prompt_id="twin")]}
    worst = 0.0
    for row in run.rows:
        prompt, tokens = prompts[row.prompt_id], row.tokens or []
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, -1)[range(len(tokens)), tokens]
        worst = max(worst, (expected - torch.tensor(row.logprobs)).abs().max().item())
    print(f"largest log-prob difference: {worst:.2e}; the probe saw {run.probed:.2e}")
    assert worst < 1e-3


def test_the_same_seed_gives_the_same_ids_and_only_what_is_missing_is_sampled(run: Run) -> None:
    twin = [(r.sample, r.tokens) for r in run.rows if r.prompt_id == "twin"]
    assert [sample for sample, _ in twin] == [2, 4, 5]
    assert twin == [(r.sample, r.tokens) for r in run.rows if r.prompt_id == "p1" and r.sample in (2, 4, 5)]


def test_a_wrong_reference_is_refused_before_sampling(run: Run) -> None:
    assert "refused to sample" in run.refusal
    assert "temperature 0.7" in run.refusal


@pytest.fixture(scope="module")
def command_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dypo run` with engine vllm at T = 0.7 on the embedded policy: eval, two rounds with training between them, eval."""
    pytest.importorskip("vllm", reason="needs the second environment: make venv-vllm")
    path = tmp_path_factory.mktemp("command")
    engine = 'engine = { type = "vllm", enforce_eager = true, max_logprob_difference = 1e-3 }\ntemperature = 0.7'
    recipe = write_recipe(
        path,
        **{'engine = { type = "hf", batch_sequences = 40 }': engine, "prompts_per_round = 40": "prompts_per_round = 12"},
    )
    dypo("run", recipe, "--set", "train.steps=2", timeout=1000)
    return path / "run"


def test_the_command_writes_vllm_rows_of_the_same_shape_whose_log_probs_are_the_trainers(command_run: Path) -> None:
    from trainer.api import sequence_logprobs

    rows = table(command_run, "rollouts")
    assert rows.height == 2 * 12 * 4
    assert set(rows["engine"]) == {"vllm"}
    assert rows["seed"].null_count() == 0
    policies = {0: ROOT / "data" / "tiny_policy", 1: command_run / "checkpoints" / "round=0" / "step=2"}
    for row in rows.to_dicts():
        again = sequence_logprobs(policies[row["round"]], row["prompt_tokens"], row["tokens"], 0.7)
        assert max(abs(a - b) for a, b in zip(again, row["logprobs"], strict=True)) < 1e-3


def test_the_manifest_says_how_vllm_was_run(command_run: Path) -> None:
    from pipeline.store import partition

    manifest = partition(command_run, "rollouts", {"round": 0}).manifest()
    assert manifest is not None
    assert manifest.facts["sampling"]["chunked_prefill"] is False
