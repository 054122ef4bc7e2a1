"""The pool through its real workers: whatever a verdict does, the others keep theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from pipeline.scorers import Item, VerdictPool, pool, score_item
from schemas.errors import UserError, WorkError
from schemas.scorers import ChoiceScorer, ExactScorer, GymScorer, MathScorer, UserScorer

ROOT = Path(__file__).parents[3]

MISBEHAVING = """
import ctypes, os, re, sys, time
ran = set()
def compute_score(data_source, solution_str, ground_truth, extra_info):
    match solution_str:
        case "loop":
            while True: pass
        case "regex": re.match(r"(a+)+$", "a" * 60 + "b")
        case "exit": os._exit(3)
        case "exit 0": os._exit(0)
        case "segfault": ctypes.string_at(0)
        case "memory": return len([bytearray(10**7) for _ in range(10**6)])
        case "raise": raise ValueError("no such luck")
        case "sys.exit": sys.exit(1)
        case "unpicklable": raise type("Odd", (Exception,), {"__init__": lambda s, a, b: None})(1, 2)
        case "slow": time.sleep(0.2)
        case "none": return None
        case "nan": return float("nan")
        case "text": return "1.0"
        case "print": print("noise on stdout")
        case "once":
            path = extra_info["path"]
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(1)
    return 1.0 if solution_str != "bad" else 0.0
"""


def item(text, answer="1", verifier="user", finish="stop", metadata=None):
    return Item(f"{verifier}:{text[:20]}", text, answer, verifier, finish, "?", metadata, "made")


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "score.py"
    path.write_text(MISBEHAVING)
    return path


@pytest.fixture(scope="module")
def running(user_file):
    verifiers = {
        "user": UserScorer(function=f"{user_file}:compute_score"),
        "math": MathScorer(),
        "exact": ExactScorer(extract=r"= (\d+)"),
        "choice": ChoiceScorer(),
    }
    with VerdictPool(verifiers, workers=2, timeout_s=0.9, memory_mb=96) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [
        ("loop", "timeout", "no verdict within 0.9 s"),
        ("regex", "timeout", "no verdict within 0.9 s"),
        ("exit", "error", "exit code 3"),
        ("exit 0", "error", "exit code 0"),
        ("segfault", "error", "SIGSEGV"),
        ("memory", "error", "out of memory: more than memory_mb = 96"),
        ("raise", "error", "ValueError: no such luck"),
        ("sys.exit", "error", "SystemExit: 1"),
        ("unpicklable", "error", "Odd"),
        ("none", "error", "returned None"),
        ("nan", "error", "returned nan"),
        ("text", "error", "not a number"),
        ("bad", "wrong", None),
    ],
)
def test_one_bad_verdict_in_a_chunk_is_recorded_and_the_others_keep_theirs(running, text, status, detail):
    texts = ["fine"] * 5 + [text] + ["fine"] * 5
    verdicts = running.score([item(each) for each in texts])
    assert [each.status for each in verdicts] == ["ok"] * 5 + [status] + ["ok"] * 5
    assert verdicts[5].reward == 0.0
    assert (verdicts[5].detail is None) == (detail is None)
    assert (detail or "") in (verdicts[5].detail or "")


def test_every_kind_of_failure_together_leaves_the_order_intact(running):
    texts = ["fine", "loop", "bad", "exit", "fine", "regex", "none", "bad", "segfault", "fine"]
    statuses = [each.status for each in running.score([item(each) for each in texts])]
    assert statuses == [
        "ok",
        "timeout",
        "wrong",
        "error",
        "ok",
        "timeout",
        "error",
        "wrong",
        "error",
        "ok",
    ]


def test_a_failure_that_does_not_repeat_is_forgiven(running, tmp_path):
    [verdict] = running.score([item("once", metadata={"path": str(tmp_path / "mark")})])
    assert verdict.status == "ok"


def test_a_chunk_longer_than_the_limit_is_no_timeout(running):
    verdicts = running.score([item("slow") for _ in range(8)])
    assert [each.status for each in verdicts] == ["ok"] * 8


def test_truncation_is_decided_without_asking_the_verifier(running):
    [verdict] = running.score([item("loop", finish="length")])
    assert (verdict.status, verdict.reward, verdict.correct) == ("truncated", 0.0, False)


def test_a_text_of_a_hundred_megabytes_is_not_sent_to_a_worker(running):
    verdicts = running.score([item("x" * 10**8), item("\\boxed{" * 100_000, verifier="math")])
    assert [each.status for each in verdicts] == ["unparseable", "unparseable"]


def test_the_pool_says_what_the_scorers_say_on_their_own(running):
    items = [item(f"{n} = {n % 7}", str(n % 5), "exact") for n in range(500)]
    items += [item(f"so \\boxed{{{n % 3}}}", "1", "math") for n in range(100)]
    items += [item(f"the answer is {letter}", "B", "choice") for letter in "ABCD?"]
    pooled = [(each.status, each.extracted) for each in running.score(items)]
    alone = [score_item(running.verifiers[each.verifier], each) for each in items]
    assert pooled == [(each.status, each.extracted) for each in alone]


def test_no_items_give_no_verdicts(running):
    assert running.score([]) == []


def test_an_unknown_verifier_is_refused_with_the_known_ones(running):
    with pytest.raises(UserError, match=r"'maths' is not in the recipe.*choice, exact, math, user"):
        running.score([item("1", verifier="maths")])


def test_a_lost_pool_is_replaced():
    with VerdictPool({"c": ChoiceScorer()}, workers=2, timeout_s=1, memory_mb=None) as opened:
        assert opened._pool is not None
        for pid in list(opened._pool._pool_manager.worker_manager.workers):
            os.kill(pid, signal.SIGKILL)  # idle ones: pebble gives up the whole pool
        time.sleep(0.3)
        verdicts = opened.score([item("ANSWER: B", "B", "c")] * 3)
        assert [each.status for each in verdicts] == ["ok"] * 3


def test_workers_are_replaced_after_their_share_of_tasks(monkeypatch):
    monkeypatch.setattr(pool, "TASKS_PER_WORKER", 1)
    monkeypatch.setattr(pool, "CHUNK", 5)
    with VerdictPool({"c": ChoiceScorer()}, workers=2, timeout_s=2, memory_mb=None) as opened:
        verdicts = opened.score([item("ANSWER: B", "B", "c")] * 30)
        assert [each.status for each in verdicts] == ["ok"] * 30


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # pebble's manager thread may trip over it
def test_workers_that_cannot_start_are_a_failure_of_the_work(monkeypatch):
    monkeypatch.setattr(pool, "_begin_worker", os._exit)
    monkeypatch.setattr(pool, "START_S", 10.0)
    with (
        pytest.raises(WorkError, match=r"starting a scoring worker (ended the process|took longer)"),
        VerdictPool({"c": ChoiceScorer()}, workers=1, timeout_s=1, memory_mb=None),
    ):
        pass


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No such file"),
        ("def f(a, b): ...", r"expected TRL's .* or verl's .* found parameters \(a, b\)"),
        ("import os; os._exit(5)", "ended the process"),
    ],
)
def test_a_bad_user_function_is_refused_before_any_work(tmp_path, source, message):
    if source is not None:
        (tmp_path / "f.py").write_text(source)
    verifiers = {"v": UserScorer(function="f.py:f")}
    with (
        pytest.raises(UserError, match=message),
        VerdictPool(verifiers, workers=1, timeout_s=1, memory_mb=None, root=tmp_path),
    ):
        pass


def test_a_user_file_that_never_finishes_importing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "START_S", 1.0)
    (tmp_path / "f.py").write_text("while True: pass")
    verifiers = {"v": UserScorer(function=f"{tmp_path}/f.py:f")}
    with (
        pytest.raises(UserError, match="took longer than 1 s"),
        VerdictPool(verifiers, workers=1, timeout_s=1, memory_mb=None),
    ):
        pass


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0)])
def test_a_pool_without_workers_or_time_is_refused(workers, timeout_s):
    with pytest.raises(UserError):
        VerdictPool({"g": GymScorer()}, workers=workers, timeout_s=timeout_s, memory_mb=None)


SCRIPT = """
import sys
from pipeline.scorers import Item, VerdictPool
from schemas.scorers import UserScorer
print("main runs")
verifiers = {{"u": UserScorer(function={function!r})}}
items = [Item("i", {text!r}, "1", "u", "stop", "?", None, "s")] * 3
with VerdictPool(verifiers, workers=2, timeout_s={limit}, memory_mb=512) as pool:
    workers = pool._pool._pool_manager.worker_manager.workers
    print(list(workers), file=sys.stderr, flush=True)
    print([verdict.status for verdict in pool.score(items)])
"""


def started(tmp_path, user_file, how, *, text="print", limit=5.0):
    """The same lines as a script without a __main__ guard, or as python -c; from another folder."""
    script = SCRIPT.format(function=f"{user_file}:compute_score", text=text, limit=limit)
    (tmp_path / "script.py").write_text(script)
    arguments = ["script.py"] if how == "script" else ["-c", script]
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=PIPE,
        stderr=PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", ["script", "-c"])
def test_it_works_without_a_main_guard_and_keeps_stdout_clean(tmp_path, user_file, how):
    with started(tmp_path, user_file, how) as run:
        out, err = run.communicate(timeout=30)
    assert out == "main runs\n['ok', 'ok', 'ok']\n"
    assert "noise on stdout" in err
    assert run.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_leaves_no_worker_behind_even_a_hung_one(tmp_path, user_file, number):
    with started(tmp_path, user_file, "script", text="regex", limit=60.0) as run:
        assert run.stderr is not None
        line = run.stderr.readline()
        workers = [int(pid) for pid in line.split("[")[1].split("]")[0].split(",")]
        time.sleep(0.5)
        assert len(workers) == 2
        assert all(running_still(pid) for pid in workers)
        run.send_signal(number)
        run.wait(timeout=10)
    deadline = time.monotonic() + 5
    while any(running_still(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running_still(pid) for pid in workers)


@pytest.mark.parametrize("after", [0.2, 0.4, 0.6])
def test_ctrl_c_while_the_workers_load_what_they_need_is_all_that_is_told(after):
    code = (
        "import signal; from pipeline.scorers.pool import VerdictPool; from schemas.scorers import MathScorer\n"
        "print('begin', flush=True)\n"
        "with VerdictPool({'m': MathScorer()}, workers=2, timeout_s=5, memory_mb=512): signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(after)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the server and its workers are told, too
        _, told = run.communicate(timeout=30)
    assert told.endswith("KeyboardInterrupt\n")
    assert told.count("Traceback") == 1, told


def running_still(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_do_not_import_what_the_program_imported(tmp_path, user_file):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys\n"
        "def compute_score(solution_str, ground_truth):\n"
        "    return float('torch' not in sys.modules and 'duckdb' not in sys.modules)\n"
    )
    sys.modules.setdefault("torch", sys)  # as if this process had loaded it
    try:
        with VerdictPool(
            {"user": UserScorer(function=f"{probe}:compute_score")},
            workers=1,
            timeout_s=5,
            memory_mb=None,
        ) as opened:
            assert opened.score([item("x")])[0].status == "ok"
    finally:
        if sys.modules["torch"] is sys:
            del sys.modules["torch"]


def test_importing_the_scorers_loads_neither_sympy_nor_reasoning_gym():
    code = "import sys, pipeline.scorers; print([m for m in ('sympy', 'reasoning_gym', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
