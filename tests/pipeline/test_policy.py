"""What a policy is (its content id), and how text becomes its token ids."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.policy import Renderer, policy_id
from schemas.errors import UserError

CHARS = "_^.\n<>/abcdefghijklmnopqrstuvwxyz 0123456789+-="
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}={% endfor %}"
ASK = [{"role": "user", "content": "1+2"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "policy"
    config = LlamaConfig(
        vocab_size=len(CHARS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARS)}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="_", bos_token="^", eos_token=".")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def ids(text: str) -> list[int]:
    return [CHARS.index(c) for c in text]


def test_the_id_is_of_the_files_that_decide_the_text(folder: Path, tmp_path: Path) -> None:
    before = policy_id(folder)
    assert len(before) == 64
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert policy_id(tmp_path / "elsewhere") == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        with (copy / name).open("ab") as file:
            file.write(b" ")
        assert policy_id(copy) != before, name


def test_trainer_state_and_generation_settings_do_not_count(folder: Path) -> None:
    before = policy_id(folder)
    (folder / "trainer").mkdir()
    (folder / "trainer" / "optimizer.safetensors").write_bytes(b"state")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.1}')
    (folder / "README.md").write_text("a card")
    assert policy_id(folder) == before


def test_a_second_shard_and_its_index_count(folder: Path) -> None:
    before = policy_id(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    indexed = policy_id(folder)
    (folder / "model-2.safetensors").write_bytes(b"more")
    assert len({before, indexed, policy_id(folder)}) == 3


def test_bad_folders_are_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*found no such folder.*on disk"):
        policy_id(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*found no config\.json"):
        policy_id(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"found no \*\.safetensors"):
        policy_id(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\).*can run code.*save_pretrained"):
        policy_id(folder)


def test_prompts_are_the_rendered_template(folder: Path) -> None:
    renderer = Renderer(folder)
    assert renderer.prompt_text(ASK) == "^1+2="
    assert renderer.prompt_tokens(ASK) == ids("^1+2=")
    tokens = renderer.prompt_tokens(ASK)
    tokens.append(0)  # the caller's list is its own
    assert renderer.prompt_tokens(ASK) == ids("^1+2=")


def test_a_trace_ends_in_one_end_of_sequence(folder: Path) -> None:
    renderer = Renderer(folder)
    assert renderer.trace_tokens("^1+2=", "so 3") == ids("so 3.")
    assert renderer.trace_tokens("^1+2=", "so 3.") == ids("so 3.")
    assert renderer.trace_tokens(ids("^1+2="), "so 3") == ids("so 3.")


def test_a_thinking_tag_that_the_template_opened_is_not_repeated(folder: Path) -> None:
    renderer = Renderer(folder)
    opened = "^1+2=<think>\n"
    assert renderer.trace_tokens(opened, "<think>\nhm</think>3") == ids("hm</think>3.")
    assert renderer.trace_tokens(ids(opened), "<think>\nhm</think>3") == ids("hm</think>3.")
    assert renderer.trace_tokens(opened, "hm</think>3") == ids("hm</think>3.")
    assert renderer.trace_tokens("^1+2=", "<think>\nhm</think>3") == ids("<think>\nhm</think>3.")


def test_a_base_models_template_opens_the_thinking_and_needs_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    renderer = Renderer(folder, "base_think")
    prompt = renderer.prompt_text(ASK)
    assert prompt == "User: This is the problem:\n1+2\nAssistant: <think>\n"
    assert renderer.trace_tokens(prompt, "<think>\nhm</think>3") == ids("hm</think>3.")
    assert renderer.trace_tokens(renderer.prompt_tokens(ASK), "<think>\nhm</think>3") == ids("hm</think>3.")
    assert renderer.prompt_text([{"role": "system", "content": "be brief"}, *ASK]) == "be brief\n\n" + prompt
    with pytest.raises(UserError, match=r"renders one problem, found a chat with the roles user, assistant, user"):
        renderer.prompt_text([*ASK, {"role": "assistant", "content": "3"}, *ASK])


def test_thinking_is_opened_behind_the_chat_template_unless_it_is_already(folder: Path) -> None:
    assert Renderer(folder, "chat").prompt_text(ASK) == "^1+2="
    assert Renderer(folder, "chat_think").prompt_text(ASK) == "^1+2=<think>\n"
    (folder / "chat_template.jinja").write_text(TEMPLATE + "{{ '<think>\\n' }}")
    assert Renderer(folder, "chat_think").prompt_text(ASK) == Renderer(folder).prompt_text(ASK) == "^1+2=<think>\n"


def test_a_template_of_ones_own_holds_the_problem_and_begins_as_the_tokenizer_begins_texts(folder: Path) -> None:
    assert Renderer(folder, "q {problem} a").prompt_text(ASK) == "q 1+2 a"
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "^", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"^": {"id": "^", "ids": [1], "tokens": ["^"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    renderer = Renderer(folder, "q {problem} a")
    assert renderer.prompt_tokens(ASK) == ids("^q 1+2 a")


def test_text_leaves_special_tokens_out(folder: Path) -> None:
    renderer = Renderer(folder)
    assert renderer.text(ids("so  3 .")) == "so  3 "
    assert renderer.text([]) == ""


def test_what_ends_a_response_comes_from_the_generation_config_first(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.unlink()
    assert Renderer(folder).eos_ids == (2,)
    path.write_text(json.dumps({"eos_token_id": [5, 2]}))
    renderer = Renderer(folder)
    assert renderer.eos_ids == (5, 2)
    assert renderer.trace_tokens("^", "a") == ids("a.")
    path.write_text(json.dumps({"eos_token_id": 5}))
    renderer = Renderer(folder)
    assert renderer.eos_ids == (5,)
    assert renderer.trace_tokens("^", "a") == ids("a>")  # a target ends in what stops the sampler


def test_a_folder_without_tokenizer_template_or_end_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no such folder"):
        Renderer(tmp_path / "nowhere")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="expected a chat template"):
        Renderer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="expected an end-of-sequence token"):
        Renderer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="expected tokenizer files"):
        Renderer(folder)
