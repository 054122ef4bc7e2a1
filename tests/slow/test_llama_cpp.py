"""A real llama.cpp server as a teacher: the tiny policy as a GGUF made here, data/serve_teacher.py, the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
from safetensors.numpy import load_file

from tests.tiny_runs import ROOT, dypo, table, write_recipe

pytestmark = pytest.mark.slow
POLICY = ROOT / "data" / "tiny_policy"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}={% endfor %}"
CONTROL, NORMAL = 3, 1


def write_gguf(path: Path) -> None:
    """The tiny policy in llama.cpp's format: its 19 characters are the vocabulary."""
    gguf = pytest.importorskip("gguf", reason="make slow installs it")
    config = json.loads((POLICY / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(layers)
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = json.loads((POLICY / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    out.add_tokenizer_model("llama")
    out.add_token_list([t.encode() for t in tokens])
    out.add_token_scores([0.0] * len(tokens))
    out.add_token_types([CONTROL if i < 3 else NORMAL for i in range(len(tokens))])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_unk_token_id(config["pad_token_id"])
    out.add_add_bos_token(False)  # the template has it
    out.add_add_space_prefix(False)
    out.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in load_file(POLICY / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours, transformers rotates halves
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        out.add_tensor(names.get_name(name, (".weight",)), tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp", reason="make slow installs it")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@contextmanager
def serving(path: Path, port: int = 0) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """(the server's process, its base_url)."""
    options = ["--ctx", 1024, "--parallel", 4, "--threads", 1, "--port", port]
    script = [sys.executable, ROOT / "data" / "serve_teacher.py", "--gguf", path, *options]
    server = subprocess.Popen(list(map(str, script)), stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout is not None
    with server.stdout as said:
        try:
            yield server, said.readline().strip()
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) in (0, -signal.SIGKILL)


def recipe(tmp_path: Path, address: str, samples: int) -> Path:
    left = 'name = "left"\nengine = { type = "program", program = "tiny.left" }'
    engine = f'type = "openai", base_url = "{address}", model = "tiny", temperature = 1.0, max_tokens = 64, concurrency = 4, retries = 1'
    path = write_recipe(tmp_path, **{left: f'name = "left"\nsamples = {samples}\nengine = {{ {engine} }}'})
    dypo("ingest", path)
    return path


def test_llama_cpp_writes_traces_that_verify_and_says_what_it_can_do(gguf_file: Path, tmp_path: Path) -> None:
    with serving(gguf_file) as (_, address):
        path = recipe(tmp_path, address, samples=4)
        for stage in ("generate", "score"):
            dypo(stage, path)
    mine = table(tmp_path / "run", "traces").filter(pl.col("teacher") == "left")
    assert mine.height == 60 * 4
    note = json.loads((tmp_path / "run/traces/teacher=left/manifest.json").read_text())["facts"]["note"]
    told = "counts the tokens of one answer where n were given, so it was asked one by one, gives log-probs; "
    assert note.startswith(told)
    alone = mine.filter(~pl.col("sampling").str.contains('"n": '))
    assert alone.height == 60 * 4 - 4  # the first request had n = 4
    used = sum(json.loads(s)["usage"]["completion_tokens"] for s in alone["sampling"])
    written = alone["text"].str.len_chars().sum()
    assert written <= used <= written + alone.height  # a token is a character; and the end of sequence
    scores = table(tmp_path / "run", "scores")
    traces = scores.filter(pl.col("teacher") == "left")["correct"].mean()
    rollouts = scores.filter(pl.col("kind") == "rollout")["correct"].mean()
    assert isinstance(traces, float)
    assert isinstance(rollouts, float)
    assert abs(traces - rollouts) < 0.15  # it is the policy itself, in another program


def test_a_llama_cpp_that_is_killed_midway_costs_no_finished_row(gguf_file: Path, tmp_path: Path) -> None:
    part = tmp_path / "run/traces/teacher=left"
    with serving(gguf_file) as (server, address):
        path = recipe(tmp_path, address, samples=64)
        command = [sys.executable, "-m", "pipeline", "generate", "teachers", str(path)]
        work = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not list(part.glob("part-*.parquet")) and time.monotonic() < end:
            time.sleep(0.02)
        server.kill()
        _, told = work.communicate(timeout=120)
    assert work.returncode == 1
    assert "16 requests failed in a row" in told
    assert "Finished rows are kept" in told
    kept = sum(pl.read_parquet(p).height for p in part.glob("part-*.parquet"))
    assert 0 < kept < 60 * 64
    with serving(gguf_file, int(address.split(":")[2].split("/")[0])):
        assert f"made {60 * 64} rows" in dypo("generate", "teachers", path).stdout
    assert table(tmp_path / "run", "failures").is_empty()
