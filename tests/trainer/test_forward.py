"""Log-probs of stored rows: the reference role, one response at a time, temperature by row."""

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.errors import UserError
from schemas.recipe import Policy
from tests.trainer.tiny import VOCAB, make_shards, tiny_llama
from trainer import forward
from trainer.batch import pack
from trainer.forward import reference_logprobs, sequence_logprobs
from trainer.model import PolicyLM, load_model, packed_if_possible
from trainer.rows import Shards


def logps_alone(model: torch.nn.Module, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double() / temperature
    logps = torch.log_softmax(logits, -1)
    return [logps[len(prompt) + t - 1, token].item() for t, token in enumerate(tokens)]


def test_rl_rows_are_read_at_their_temperature_and_sft_rows_at_one(model: LlamaForCausalLM) -> None:
    table = make_shards(temperature=0.7)
    rows = Shards(table, None).rows(list(zip(table["route"].to_pylist(), table["item_id"].to_pylist(), strict=True)))
    with torch.no_grad():
        logps_BT, entropy_BT = packed_if_possible(tiny_llama())(pack(rows))
    for row, logps_T, entropy_T in zip(rows, logps_BT, entropy_BT, strict=True):
        n, temperature = len(row.tokens), 0.7 if row.route == "rl" else 1.0
        want = logps_alone(model, row.prompt_tokens.tolist(), row.tokens.tolist(), temperature)
        np.testing.assert_allclose(logps_T[:n], want, atol=1e-5)
        assert logps_T[n:].abs().sum() == 0
        assert entropy_T[n:].abs().sum() == 0
        assert 0 < entropy_T[:n].min() <= entropy_T[:n].max() <= np.log(VOCAB)


def test_sft_rows_ignore_a_temperature_written_in_the_shard() -> None:
    table = make_shards(hard=1, mid=0).to_pylist()
    (first, *_) = Shards(
        pa.Table.from_pylist([row | {"temperature": 0.3} for row in table], make_shards().schema), None
    ).rows([("sft", table[0]["item_id"])])
    assert first.temperature == 1.0


def test_a_model_without_logits_to_keep_gives_the_same(model: LlamaForCausalLM) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return model(input_ids=input_ids, use_cache=use_cache)

    table = make_shards()
    rows = Shards(table, None).rows([(r["route"], r["item_id"]) for r in table.to_pylist()])
    batch = pack(rows, share=False)
    with torch.no_grad():
        a, b = PolicyLM(model)(batch)[0], PolicyLM(Plain())(batch)[0]
    torch.testing.assert_close(a, b)


@pytest.mark.timeout(300, method="thread")  # the other method has the same alarm
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer Python ignores it
def test_ctrl_c_while_rows_are_packed_stays_a_ctrl_c() -> None:
    """C code that calls back into Python may put an error of its own in its place, as numpy's structured comparison does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    table = make_shards(mid=40)
    rows = Shards(table, None).rows([(r["route"], r["item_id"]) for r in table.to_pylist()])
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for at in np.linspace(1e-4, 3e-3, 1000):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, at)
                for _ in range(1000):
                    pack(rows)
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_sequence_logprobs_take_a_folder_or_a_model(policy_folder: Path, model: LlamaForCausalLM) -> None:
    want = logps_alone(model, [4, 5], [6, 7, 1], 0.7)
    assert sequence_logprobs(policy_folder, [4, 5], [6, 7, 1], 0.7) == pytest.approx(want, abs=1e-5)
    loaded = load_model(policy_folder, Policy(model=policy_folder))
    assert sequence_logprobs(loaded, [4, 5], [6, 7, 1], 0.7) == pytest.approx(want, abs=1e-5)
    assert sequence_logprobs(loaded, [4, 5], [], 0.7) == []
    with pytest.raises(ValueError, match="prompt"):
        sequence_logprobs(loaded, [], [6], 0.7)


def test_reference_logprobs_cover_the_rl_rows_once_at_their_temperature(
    policy_folder: Path, model: LlamaForCausalLM
) -> None:
    table = make_shards(temperature=0.7)
    got = pa.concat_tables(reference_logprobs(policy_folder, table, Policy(model=policy_folder), 60)).to_pylist()
    rl = {row["item_id"]: row for row in table.to_pylist() if row["route"] == "rl"}
    assert sorted(r["item_id"] for r in got) == sorted(rl)
    for r in got:
        row = rl[r["item_id"]]
        assert r["temperature"] == row["temperature"]
        want = logps_alone(model, row["prompt_tokens"], row["tokens"], 0.7)
        np.testing.assert_allclose(r["logprobs"], want, atol=1e-5)


def test_reference_logprobs_after_an_interruption_are_bitwise_the_same(
    policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "REFERENCE_ROWS", 8)
    table, policy = make_shards(mid=6), Policy(model=policy_folder)
    whole = list(reference_logprobs(policy_folder, table, policy, 60))
    assert len(whole) == 3
    finished = frozenset(whole[1]["item_id"].to_pylist())
    rest = list(reference_logprobs(policy_folder, table, policy, 60, finished=finished))
    assert rest == [whole[0], whole[2]]
    one = frozenset(whole[1]["item_id"].to_pylist()[:1])
    assert list(reference_logprobs(policy_folder, table, policy, 60, finished=one)) == [
        whole[0],
        whole[1].slice(1),
        whole[2],
    ]


def test_reference_logprobs_of_a_bfloat16_policy_are_those_that_training_computes(policy_folder: Path) -> None:
    table = make_shards(hard=0)
    half = Policy.model_validate({"model": policy_folder, "dtype": "bfloat16", "device": "cpu"})
    exact = Policy.model_validate({"model": policy_folder, "device": "cpu"})
    got, plain = (  # a budget of 1: each row alone, so that what is compared is bitwise
        {row["item_id"]: row["logprobs"] for t in reference_logprobs(policy_folder, table, p, 1) for row in t.to_pylist()}
        for p in (half, exact)
    )
    model, shards = load_model(policy_folder, half), Shards(table, None)
    for prompt in sorted(set(table["prompt_id"].to_pylist())):
        rows = shards.rows([("rl", r["item_id"]) for r in table.to_pylist() if r["prompt_id"] == prompt])
        for row in rows:
            with torch.no_grad():
                logps_BT, _ = model(pack([row]))
            assert got[row.item_id] == logps_BT[0].tolist()
            assert got[row.item_id] != plain[row.item_id]
            assert got[row.item_id] == pytest.approx(plain[row.item_id], abs=0.3)


def test_the_pad_token_s_embedding_learns_like_any_other(policy_folder: Path) -> None:
    """transformers gives the embedding a padding_idx, which silently drops that token's gradient."""
    model = load_model(policy_folder, Policy(model=policy_folder, device="cpu"))
    table = make_shards(hard=1, mid=0).to_pylist()[0] | {"prompt_tokens": [5, 0, 5]}
    (row,) = Shards(pa.Table.from_pylist([table], make_shards().schema), None).rows([("sft", table["item_id"])])
    lm = model.lm
    embedding, head = lm.get_submodule("model.embed_tokens"), lm.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # untied: the input side alone
    model(pack([row]))[0].sum().backward()
    assert embedding.weight.grad[0].abs().sum() > 0


def test_a_missing_model_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no config\.json"):
        load_model(tmp_path / "nowhere", Policy(model=tmp_path))
