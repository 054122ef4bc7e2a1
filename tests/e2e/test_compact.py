"""`dypo compact` on a real run: every table as it was, nothing stale, and the stages go on from there."""

import json
from pathlib import Path

from schemas.tables import TABLES
from tests.tiny_runs import dypo, table


def test_a_compacted_run_is_the_same_run(a_copy: Path, undisturbed: Path) -> None:
    done = [json.loads(line) for line in dypo("compact", a_copy, "--json").stdout.splitlines()]
    assert any(d["after"] == 1 < d["before"] for d in done)
    for name in TABLES:
        assert table(a_copy, name).equals(table(undisturbed, name)), name
    states = [json.loads(line) for line in dypo("status", a_copy, "--json").stdout.splitlines()]
    assert {s["state"] for s in states if "state" in s} == {"done"}
    for command in (["generate", "rollouts"], ["score"], ["grade"], ["train"]):
        said = [json.loads(line) for line in dypo(*command, a_copy, "--round", 1, "--json").stdout.splitlines()]
        assert {o["action"] for o in said} == {"nothing"}, command
    dypo("verify", a_copy)
    (made,) = [
        json.loads(x)
        for x in dypo("generate", "rollouts", a_copy, "--round", 1, "--set", "rollouts.k=5", "--json").stdout.splitlines()
    ]
    assert (made["action"], made["added"]) == ("added", 40)
