"""What a stored rollout costs on disk, and how fast one prompt's rollouts read from a large part.

    python -m tests.bench.store [--rows N] [--json]        or  make bench-store

20,000 rollouts as default: 2,500 prompts x 8 of 100 prompt tokens and 128 to 896 response tokens. Raw: the text in UTF-8, 4 bytes for each
token id (the prompt's too) and 4 for each log-prob. Texts are source files of the installed packages (code and its docstrings), cut from one long text so that
no two are alike (samples of one prompt, which repeat one another in a real run, would cost less); ids are those of a byte-level BPE
vocabulary of 32,000 trained on them. Log-probs are made: minus exp of a normal (mean -3, deviation 2.5; most tokens nearly sure, a
few below e^-8), as float32 with every bit of the mantissa in use, as an engine gives them.
    ours             a part as `dypo generate` writes it, all columns, checksums and row groups included
    ours, float16    the same under rollouts.logprobs = "float16"
    parquet          pyarrow's default encodings, with zstd
    jsonl            one object a line, log-probs rounded to 6 places
It ends with exit code 1, saying which, where a floor is missed (FLOORS, READ_MS).
"""

import argparse
import json
import site
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import Spec, finish
from pipeline.stages.generate import stored_logprobs
from pipeline.store import Partition, as_declared, connect, partition, read_parts
from schemas.tables import ARROW

K, PROMPT, SHORTEST, LONGEST, VOCABULARY = 8, 100, 128, 896, 32_000
FLOORS = {"ours": 0.52, "ours, float16": 0.38}
READ_MS = 30.0
PACKAGES = (
    "torch",
    "transformers",
    "polars",
    "pyarrow",
    "numpy",
    "pandas",
    "sympy",
    "pydantic",
    "tokenizers",
    "jinja2",
    "rich",
)


def sources(wanted: int) -> str:
    """So many characters of the installed packages' source files, each file once, in an order of its own."""
    folders = [Path(folder) / name for folder in (*site.getsitepackages(), *sys.path) for name in PACKAGES]
    paths = [path for folder in dict.fromkeys(folders) if folder.is_dir() for path in sorted(folder.rglob("*.py"))]
    Random(0).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        if size >= wanted:
            return "".join(texts)
        texts.append(path.read_text(errors="ignore"))
        size += len(texts[-1])
    sys.exit(f"only {size:,} characters of source files are installed, {wanted:,} are needed: fewer --rows")


def rollouts(rows: int) -> pa.Table:
    """The rows, as the table declares them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST, rows)
    text = sources(int((lengths.sum() + rows // K * PROMPT) * 5))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    tokenizer.train_from_iterator(pieces[::8], trainer)
    ids = np.concatenate([np.array(e.ids, np.int32) for e in tokenizer.encode_batch(pieces)])
    assert len(ids) >= lengths.sum() + rows // K * PROMPT, "the source files gave fewer tokens than wanted"
    at, made, prompt = 0, [], ids[:0]
    for row, length in enumerate(lengths.tolist()):
        if row % K == 0:
            prompt, at = ids[at : at + PROMPT], at + PROMPT
        tokens, at = ids[at : at + length], at + length
        logprobs = -np.minimum(np.exp(rng.normal(-3.0, 2.5, length)), 30.0)
        made.append(
            {
                "rollout_id": rng.bytes(16).hex(), "prompt_id": f"{row // K * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}",
                "round": 0, "sample": row % K, "policy": "5f" * 32, "text": tokenizer.decode(tokens.tolist()),
                "prompt_tokens": prompt, "tokens": tokens, "logprobs": logprobs.astype(np.float32), "finish_reason": "stop",
                "engine": "hf", "temperature": 1.0, "top_p": 1.0, "seed": row // K,
            }
        )  # fmt: skip
    return as_declared(pa.Table.from_pylist(made, schema=ARROW["rollouts"]), "rollouts")


def raw_bytes(rows: pa.Table) -> int:
    lists = sum(4 * len(rows[name].combine_chunks().flatten()) for name in ("prompt_tokens", "tokens", "logprobs"))
    return lists + sum(len(t.encode()) for t in rows["text"].to_pylist())


def write_ours(run: Path, rows: pa.Table, kind: str) -> Partition:
    """One part, complete, in a run of its own."""
    run.mkdir()
    (run / "recipe.toml").write_text("")
    it = Spec("rollouts", partition(run, "rollouts", {"round": 0}), {}, {}, 0)
    at = rows.column_names.index("logprobs")
    logprobs = [stored_logprobs(row, kind) for row in rows["logprobs"].to_numpy()]
    it.partition.write(
        rows.set_column(at, rows.schema.field(at), pa.array(logprobs, rows.schema.field(at).type)), it.fingerprint
    )
    finish(it)
    return it.partition


def read_ms(part: Partition, prompts: list[str]) -> float:
    """One prompt's rows with all their columns, through the view that `dypo sql` has; the median."""
    con, took = connect(part.run), []
    for prompt in prompts:
        began = time.perf_counter()
        got = con.execute("select * from rollouts where prompt_id = $id", {"id": prompt}).fetchall()
        took.append(1000 * (time.perf_counter() - began))
        assert len(got) == K
    return median(took)


def measure(count: int, folder: Path) -> dict[str, Any]:
    rows = rollouts(count)
    raw = raw_bytes(rows)
    sizes, seconds = {}, {}
    for name, kind in (("ours", "float32"), ("ours, float16", "float16")):
        began = time.perf_counter()
        part = write_ours(folder / kind, rows, kind)
        seconds[name] = time.perf_counter() - began
        sizes[name] = sum(p.stat().st_size for p in part.files())
    exact = partition(folder / "float32", "rollouts", {"round": 0})
    assert read_parts(exact.files(), "rollouts").equals(rows), "what was read is not what was written"
    began = time.perf_counter()
    pq.write_table(rows, folder / "default.parquet", compression="zstd")
    seconds["parquet"] = time.perf_counter() - began
    sizes["parquet"] = (folder / "default.parquet").stat().st_size
    began = time.perf_counter()
    with open(folder / "rows.jsonl", "w") as out:
        for row in rows.to_pylist():
            out.write(json.dumps({**row, "logprobs": [round(x, 6) for x in row["logprobs"]]}) + "\n")
    seconds["jsonl"] = time.perf_counter() - began
    sizes["jsonl"] = (folder / "rows.jsonl").stat().st_size
    prompts = rows["prompt_id"].unique().to_pylist()
    return {
        "rows": count,
        "raw_mb": raw / 1e6,
        "of_raw": {name: size / raw for name, size in sizes.items()},
        "write_mb_per_s": {name: raw / 1e6 / s for name, s in seconds.items()},
        "read_ms": read_ms(exact, prompts[:: max(1, len(prompts) // 25)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rows // K * K, Path(folder))
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['rows']:,} rollouts, {found['raw_mb']:.0f} MB raw")
        for name, share in found["of_raw"].items():
            print(f"  {name:14} {share:.3f} of raw, written at {found['write_mb_per_s'][name]:.0f} MB/s")
        print(f"  one prompt's {K} rollouts read in {found['read_ms']:.1f} ms")
    missed = [
        f"{name} is {found['of_raw'][name]:.3f} of raw, at most {most}"
        for name, most in FLOORS.items()
        if found["of_raw"][name] > most
    ]
    missed += [f"one prompt reads in {found['read_ms']:.1f} ms, at most {READ_MS}"] if found["read_ms"] > READ_MS else []
    for problem in missed:
        print(f"missed: {problem}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
