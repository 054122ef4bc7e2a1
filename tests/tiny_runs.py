"""A small complete run on the embedded policy, for tests: a recipe on disk, and the real command in a real process.

One idea: most of a small command's time is importing torch and transformers (4.5 s of CPU), so `dypo` forks its processes
from one that has them already (multiprocessing's fork server). What gets killed is a fresh interpreter: `kill_when`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

ROOT = Path(__file__).parent.parent

RECIPE = """
name = "small"
run = "{run}"
seed = 3
rounds = 2

[policy]
model = "{root}/data/tiny_policy"
threads = 1

[[sources]]
type = "file"
name = "sums"
path = "{root}/data/tiny/train.jsonl"
verifier = "sum"
limit = 60

[[sources]]
type = "file"
name = "fresh"
path = "{root}/data/tiny/eval_id.jsonl"
verifier = "sum"
split = "eval"
limit = 12

[[teachers]]
name = "left"
engine = {{ type = "program", program = "tiny.left" }}

[[teachers]]
name = "noisy"
samples = 2
engine = {{ type = "program", program = "tiny.noisy" }}

[rollouts]
k = 4
prompts_per_round = 40
max_tokens = 64
engine = {{ type = "hf", batch_sequences = 40 }}

[score]
workers = 1
verifiers.sum = {{ type = "exact", extract = "^[^>]*>([0-9]+)$" }}

[train]
steps = 6
prompts_per_step = 6
checkpoint_every = 2
method = {{ type = "dypo", lr = 1e-3 }}

[eval]
max_tokens = 64
suites = [{{ name = "id", sources = ["fresh"], n = 2, pass_k = [1, 2] }}]
"""

NOT_OF_THE_RUN = {  # what a clock decides
    "scores": ["elapsed_ms"],
    "metrics": ["when"],
}
CLOCKED_METRICS = ["tokens_per_s"]


def write_recipe(folder: Path, text: str = RECIPE, **changes: str) -> Path:
    """The recipe in `folder`, its run folder beside it. `changes`: text -> other text."""
    path = folder / "small.toml"
    body = text.format(run=folder / "run", root=ROOT)
    for old, new in changes.items():
        assert old in body, old
        body = body.replace(old, new)
    path.write_text(body)
    return path


os.environ["HF_HUB_OFFLINE"] = "1"  # of this process too: the fork server reads it once, when it imports transformers
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["pipeline.flow", "trainer.api", "transformers.models.llama.modeling_llama"])


def dypo(
    *args: object, check: bool = True, timeout: float = 280, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the real command in a process of its own, with no terminal and no way to a hub."""
    words = list(map(str, args))
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        environ = {**os.environ, **(env or {})}
        process = forks.Process(target=_command, args=(words, environ, out.name, err.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout, out.read(), err.read())
        got = subprocess.CompletedProcess(words, process.exitcode, out.read(), err.read())
    assert not check or got.returncode == 0, got.stderr
    return got


def _command(words: list[str], environ: dict[str, str], out: str, err: str) -> None:
    """What `python -m pipeline` does, in a fork: its folder, environment, standard streams and arguments first."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environ)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    sys.argv = ["dypo", *words]

    from pipeline.cli import main

    main()


def kill_when(args: list[object], ready, timeout: float = 200) -> bool:
    """Starts the command, sends SIGKILL as soon as `ready()` says so. False if it ended before that."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < end:
            if ready():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
        return False
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def table(run: Path, name: str) -> pl.DataFrame:
    """A whole table as rows sorted by key, without what a clock decides."""
    from pipeline.store import ask, connect
    from schemas.tables import TABLES

    frame = pl.from_arrow(ask(connect(run), f"select * from {name}"))
    assert isinstance(frame, pl.DataFrame)
    frame = frame.drop(NOT_OF_THE_RUN.get(name, []))
    if name == "metrics":
        frame = frame.filter(~pl.col("name").is_in(CLOCKED_METRICS))
    return frame.sort(*TABLES[name].key)
