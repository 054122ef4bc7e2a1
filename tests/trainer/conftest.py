"""The tiny policy, on disk and in memory. One thread, so that bitwise means bitwise."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.trainer.tiny import tiny_llama


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}\n')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "manifest.json").write_text("a partition's, not the model's")
    return folder


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()
