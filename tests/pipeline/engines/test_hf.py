"""The embedded engine against the dumbest loops: one row, no cache, no padding, no batch."""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from pipeline.engines.base import Ask, Failure, Sample, Sampling
from pipeline.engines.hf import HFSampler, plan_batches
from pipeline.policy import Renderer
from schemas.errors import UserError, WorkError
from schemas.recipe import HFEngine, Policy

CHARS = "_^.0123456789+-=>:!"
EOS = CHARS.index(".")
TEXTS = ("8", "8+46", "1+2+3", "77+15+20", "9+9+9+9+9")


def save(path: Path, **changes: Any) -> Path:
    """A random policy over the tiny alphabet; by default long and short answers both occur."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(CHARS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 96, "initializer_range": 0.3,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
    }  # fmt: skip
    settings.update(changes)
    if "sliding_window" in settings:
        MistralForCausalLM(MistralConfig(**settings)).save_pretrained(path)
    else:
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(path)
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARS)}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = Fast(tokenizer_object=inner, pad_token="_", bos_token="^", eos_token=".")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}={% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("policy"))


def sampler(folder: Path, sampling: Sampling, size: int = 64) -> HFSampler:
    policy = Policy.model_validate({"model": folder, "device": "cpu"})
    return HFSampler(folder, policy, HFEngine(batch_sequences=size), sampling, Renderer(folder))


def make_asks(folder: Path, k: int = 5, texts: tuple[str, ...] = TEXTS) -> list[Ask]:
    renderer = Renderer(folder)
    asks = []
    for n, text in enumerate(texts):
        messages = [{"role": "user", "content": text}]
        asks.append(Ask(f"p{n}", messages, tuple(range(k)), 1000 + n, "", {}, renderer.prompt_tokens(messages)))
    return asks


def rows(lists: Any) -> dict[tuple[str, int], Sample]:
    out = {(row.prompt_id, row.sample): row for part in lists for row in part}
    assert all(isinstance(row, Sample) for row in out.values())
    return out


@lru_cache(maxsize=4)
def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval()


def forward(folder: Path, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one row, without cache or padding."""
    model = load(folder)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def dumb(folder: Path, ask: Ask, sample: int, sampling: Sampling) -> list[int]:
    """The sampler's specification: one token at a time, everything computed again, sums in a Python loop."""
    model = load(folder)
    noise = np.random.Generator(np.random.Philox(key=[ask.seed, sample]))
    prompt, tokens = ask.prompt_tokens or [], []
    while len(tokens) < sampling.max_tokens and (not tokens or tokens[-1] != EOS):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double().numpy()
        if sampling.temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        weights = np.exp((logits - logits.max()) / sampling.temperature)
        p = weights / weights.sum()
        if sampling.top_p < 1:
            kept, total = set(), 0.0
            for token in np.argsort(-p, kind="stable"):
                if total < sampling.top_p:
                    kept.add(int(token))
                total += p[token]
            p = np.array([q if token in kept else 0.0 for token, q in enumerate(p)])
        u, total, token = noise.random() * p.sum(), 0.0, -1
        while total <= u:
            token += 1
            total += p[token]
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_an_unpadded_forwards_at_the_sampling_temperature(folder: Path, temperature: float) -> None:
    asks = make_asks(folder)
    got = rows(sampler(folder, Sampling(temperature, 1.0, 40)).run(asks, frozenset()))
    assert len(got) == 25
    for ask in asks:
        for sample in ask.samples:
            row = got[ask.prompt_id, sample]
            tokens = row.tokens or []
            logits = forward(folder, ask.prompt_tokens or [], tokens)
            expected = torch.log_softmax(logits / temperature, -1)[range(len(tokens)), tokens]
            torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 1.0, 24), Sampling(0.7, 1.0, 24), Sampling(1.0, 0.8, 24), Sampling(0.0, 1.0, 24)], ids=repr
)
def test_tokens_are_those_of_the_dumbest_loop(folder: Path, sampling: Sampling) -> None:
    asks = make_asks(folder, k=3)
    got = rows(sampler(folder, sampling).run(asks, frozenset()))
    for ask in asks:
        for sample in ask.samples:
            assert got[ask.prompt_id, sample].tokens == dumb(folder, ask, sample, sampling), (ask.prompt_id, sample)


def test_log_probs_with_top_p_and_greedy_cover_the_whole_vocabulary(folder: Path) -> None:
    ask = make_asks(folder, k=2)[1]
    for sampling, temperature in ((Sampling(0.6, 0.8, 12), 0.6), (Sampling(0.0, 1.0, 12), 1.0)):
        row = rows(sampler(folder, sampling).run([ask], frozenset()))["p1", 1]
        tokens = row.tokens or []
        logits = forward(folder, ask.prompt_tokens or [], tokens)
        expected = torch.log_softmax(logits / temperature, -1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-5)


def test_noise_belongs_to_the_sample_not_to_its_batch(folder: Path) -> None:
    sampling = Sampling(1.0, 1.0, 30)
    asks = make_asks(folder)
    together = rows(sampler(folder, sampling).run(asks, frozenset()))
    for ask in asks:
        alone = rows(sampler(folder, sampling, size=2).run([ask], frozenset()))
        assert {key: row.tokens for key, row in alone.items()} == {key: together[key].tokens for key in alone}
    reseeded = rows(sampler(folder, sampling).run([Ask("p1", [], (0, 1), 7, "", {}, asks[1].prompt_tokens)], frozenset()))
    assert any(reseeded[key].tokens != together[key].tokens for key in reseeded)


def test_the_samples_of_a_group_differ(folder: Path) -> None:
    got = rows(sampler(folder, Sampling(1.0, 1.0, 40)).run(make_asks(folder, k=8), frozenset()))
    for n in range(len(TEXTS)):
        assert len({tuple(row.tokens or ()) for (prompt, _), row in got.items() if prompt == f"p{n}"}) == 8


def test_an_interrupted_run_ends_in_bitwise_the_same_rows(folder: Path) -> None:
    sampling, asks = Sampling(1.0, 1.0, 30), make_asks(folder)
    before = frozenset({("p2", 1), ("p4", 0)})  # finished by an earlier, shorter work list
    undisturbed = rows(sampler(folder, sampling, size=10).run(asks, before))
    assert len(undisturbed) == 23
    for parts in (1, 2):
        engine = sampler(folder, sampling, size=10).run(asks, before)
        kept = rows(next(engine) for _ in range(parts))
        resumed = rows(sampler(folder, sampling, size=10).run(asks[::-1], before | frozenset(kept)))
        assert not kept.keys() & resumed.keys()
        assert kept | resumed == undisturbed  # floats too: equality of every bit


def test_finished_samples_are_not_computed(folder: Path) -> None:
    asks = make_asks(folder, k=2)
    everything = frozenset((ask.prompt_id, sample) for ask in asks for sample in ask.samples)
    engine = sampler(folder, Sampling(1.0, 1.0, 8))
    assert list(engine.run(asks, everything)) == []
    assert engine._loaded is None
    assert set(rows(engine.run(asks, everything - {("p3", 1)}))) == {("p3", 1)}


def test_batches_are_whole_groups_from_short_to_long(folder: Path) -> None:
    asks = make_asks(folder, k=4)
    plan = plan_batches(asks, 10)
    assert [len(batch) for batch in plan] == [8, 8, 4]
    assert plan == plan_batches(asks[::-1], 10)
    assert [ask.prompt_id for batch in plan for ask, sample in batch if sample == 0] == ["p0", "p1", "p2", "p3", "p4"]
    assert [len(batch) for batch in plan_batches(asks, 3)] == [3, 1] * 5
    assert plan_batches([], 3) == []


def test_stop_and_length(folder: Path) -> None:
    got = rows(sampler(folder, Sampling(1.0, 1.0, 12)).run(make_asks(folder, k=12), frozenset()))
    assert Counter(row.finish_reason for row in got.values()).keys() == {"stop", "length"}
    for row in got.values():
        tokens = row.tokens or []
        assert len(tokens) == len(row.logprobs or [])
        assert EOS not in tokens[:-1]
        if row.finish_reason == "stop":
            assert tokens[-1] == EOS
        else:
            assert tokens[-1] != EOS
            assert len(tokens) == 12
        assert row.text == "".join(CHARS[token] for token in tokens if token > EOS)


def test_the_first_token_is_distributed_as_the_softmax(folder: Path) -> None:
    prompt = make_asks(folder)[1].prompt_tokens or []
    draws = 4000
    asks = [Ask(f"q{n}", [], tuple(range(8)), 31 * n, "", {}, prompt) for n in range(draws // 8)]
    got = rows(sampler(folder, Sampling(0.7, 1.0, 1), size=1000).run(asks, frozenset()))
    seen = Counter(row.tokens[0] for row in got.values() if row.tokens)
    expected = draws * torch.softmax(forward(folder, prompt, [3])[0].double() / 0.7, -1).numpy()
    common = expected >= 5
    observed = np.array([seen[token] for token in range(len(CHARS))])
    parts = [(observed[common], expected[common]), (observed[~common].sum(), max(expected[~common].sum(), 1e-9))]
    chi2 = sum(float(np.sum((o - e) ** 2 / e)) for o, e in parts)
    freedom = int(common.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, f"chi2 {chi2:.1f} at {freedom} degrees of freedom"


def test_a_response_ends_where_the_policys_context_does(folder: Path, tmp_path: Path) -> None:
    short = save(tmp_path / "short", max_position_embeddings=12, eos_token_id=None)
    (short / "generation_config.json").write_text('{"eos_token_id": 0}')
    asks = [ask for ask in make_asks(short, k=2) if ask.prompt_id != "p4"]
    got = rows(sampler(short, Sampling(1.0, 1.0, 50)).run(asks, frozenset()))
    full = [(ask.prompt_tokens or [], got[ask.prompt_id, n]) for ask in asks for n in (0, 1)]
    assert any(row.finish_reason == "length" for _, row in full)
    for prompt, row in full:
        assert len(prompt) + len(row.tokens or []) <= 12
        assert row.finish_reason == "stop" or len(prompt) + len(row.tokens or []) == 12
    long = Ask("long", [], (0, 1), 1, "", {}, list(range(3, 15)))
    out = [row for part in sampler(short, Sampling(1.0, 1.0, 50)).run([*asks, long], frozenset()) for row in part]
    failures = [row for row in out if isinstance(row, Failure)]
    assert [(row.prompt_id, row.sample) for row in failures] == [("long", 0), ("long", 1)]
    assert "12 tokens" in failures[0].why
    assert len(out) - len(failures) == len(got)


def test_a_sliding_window_model_with_unequal_prompts(tmp_path: Path) -> None:
    windowed = save(tmp_path / "windowed", sliding_window=6)
    asks = make_asks(windowed, k=3)
    for row_key, row in rows(sampler(windowed, Sampling(1.0, 1.0, 20)).run(asks, frozenset())).items():
        ask = next(ask for ask in asks if ask.prompt_id == row_key[0])
        tokens = row.tokens or []
        logits = forward(windowed, ask.prompt_tokens or [], tokens)
        expected = torch.log_softmax(logits, -1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-4)


def test_bfloat16_is_honoured(folder: Path) -> None:
    policy = Policy.model_validate({"model": folder, "device": "cpu", "dtype": "bfloat16"})
    engine = HFSampler(folder, policy, HFEngine.model_validate({}), Sampling(1.0, 1.0, 8), Renderer(folder))
    got = rows(engine.run(make_asks(folder, k=2), frozenset()))
    assert engine._loaded.dtype == torch.bfloat16
    assert all(np.isfinite(row.logprobs or [np.nan]).all() for row in got.values())


def test_broken_weights_and_a_missing_device_are_refused(tmp_path: Path) -> None:
    broken = save(tmp_path / "broken")
    model: Any = AutoModelForCausalLM.from_pretrained(str(broken))
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(WorkError, match=r"broken.*finite logits"):
        list(sampler(broken, Sampling(1.0, 1.0, 4)).run(make_asks(broken), frozenset()))
    if not torch.cuda.is_available():
        policy = Policy.model_validate({"model": broken, "device": "cuda"})
        with pytest.raises(UserError, match=r"policy\.device = 'cuda'"):
            HFSampler(broken, policy, HFEngine.model_validate({}), Sampling(1.0, 1.0, 4), Renderer(broken))
