"""A run scored by a judge on loopback: nothing is asked twice, a dead server costs nothing that it had judged, no secret is kept."""

from pathlib import Path

import polars as pl

from pipeline.store import partition
from tests.pipeline.engines.test_openai import Answer, Serve, chat, refusal, serve
from tests.pipeline.scorers.test_judge import answer_shown
from tests.tiny_runs import dypo, table

KEY = "sk-very-secret-0123456789"
__all__ = ["serve"]


def by_last_digit(_: int, body: dict) -> Answer:
    """A judge that likes large last digits."""
    said = answer_shown(body)
    return chat(f"Its last character is {said[-1]}.\nScore: {(int(said[-1]) if said[-1].isdigit() else 0) / 9:.3f}")


def score(run: Path, url: str, *settings: str, round: int = 0, check: bool = True, **options: object):
    options = {"correct_at": 0.6, "concurrency": 4, "retries": 0, **options}
    more = "".join(f", {name}={value}" for name, value in options.items())
    verifier = f"score.verifiers.sum={{type='judge', base_url='{url}', model='m', rubric='Large last digits.', api_key_env='J'{more}}}"
    words = [word for key in (verifier, *settings) for word in ("--set", key)]
    return dypo("score", run, "--round", round, *words, check=check, env={"J": KEY, "NO_PROXY": "127.0.0.1"})


def judged(run: Path, round: int = 0) -> pl.DataFrame:
    rows = table(run, "scores").filter((pl.col("round") == round) | (pl.col("kind") == "trace"), pl.col("kind") != "eval")
    return rows.sort("kind", "id")


def test_rewards_are_graded_the_threshold_decides_success_and_nothing_is_asked_twice(a_copy: Path, serve: Serve) -> None:
    server = serve(by_last_digit)
    score(a_copy, server.url)
    asked, first = len(server.requests), judged(a_copy)
    seen = first.filter(pl.col("status").is_in(["ok", "wrong"]))
    assert seen["reward"].n_unique() > 5
    assert seen.filter(pl.col("correct") != (pl.col("reward") >= 0.6)).is_empty()
    assert asked == seen.select(pl.col("detail").str.slice(0, 38)).n_unique() <= seen.height

    score(a_copy, server.url, correct_at=0.3)
    second = judged(a_copy)
    assert second["reward"].equals(first["reward"])
    assert second.filter(pl.col("correct")).height > first.filter(pl.col("correct")).height
    score(a_copy, "http://127.0.0.1:9/v1")  # back again, by another way to the same judge
    assert judged(a_copy).equals(first)
    assert len(server.requests) == asked

    dypo("grade", a_copy, "--round", 0)
    successes = first.filter(pl.col("kind") == "rollout").group_by("prompt_id").agg(pl.col("correct").sum().alias("n"))
    grades = table(a_copy, "grades").filter(pl.col("round") == 0).join(successes, on="prompt_id")
    assert grades["successes"].to_list() == grades["n"].to_list()
    assert not [path for path in a_copy.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_what_a_dead_server_had_judged_stays_and_the_rest_is_asked_of_the_next(a_copy: Path, serve: Serve) -> None:
    dies = serve(lambda n, body: by_last_digit(n, body) if n < 30 else None)
    failed = score(a_copy, dies.url, check=False)
    assert failed.returncode == 1
    assert "requests failed in a row" in failed.stderr
    assert "Finished rows are kept" in failed.stderr
    assert KEY not in failed.stderr + failed.stdout
    lives = serve(by_last_digit)
    score(a_copy, lives.url)
    rows = judged(a_copy).filter(pl.col("status").is_in(["ok", "wrong"]))
    assert len(lives.requests) == rows.select(pl.col("detail").str.slice(0, 38)).n_unique() - 30


def test_malformed_replies_are_no_fault_of_the_policy(a_copy: Path, serve: Serve) -> None:
    def garbled(n: int, body: dict) -> Answer:
        return chat("I had rather not say") if answer_shown(body).endswith("7") else by_last_digit(n, body)

    score(a_copy, serve(garbled).url, "score.max_failed=0.5")
    bad = judged(a_copy).filter(pl.col("kind") == "rollout", pl.col("status") == "error")
    assert bad.height > 0
    dypo("grade", a_copy, "--round", 0)
    grades = table(a_copy, "grades").filter(pl.col("round") == 0, pl.col("prompt_id").is_in(bad["prompt_id"].to_list()))
    assert set(grades["reason"]) == {"unjudged"}


def test_what_had_no_reply_is_asked_again_by_the_next_score_and_nothing_else_is(a_copy: Path, serve: Serve) -> None:
    def failing(n: int, body: dict) -> Answer:
        last = answer_shown(body)[-1]
        return refusal(500, "overloaded") if last == "7" else chat("No.") if last == "3" else by_last_digit(n, body)

    def score_again(url: str, check: bool = True):
        return score(a_copy, url, "score.max_failed=0.5", check=check)

    first = serve(failing)
    score_again(first.url)
    before = judged(a_copy)
    silent = before.filter(pl.col("detail").str.starts_with("the judge gave no reply"))
    assert 0 < silent.height < before.filter(pl.col("status") == "error").height
    dypo("grade", a_copy, "--round", 0)
    grades = partition(a_copy, "grades", {"round": 0}).manifest()

    score_again(
        serve(lambda n, body: chat("?", finish="content_filter")).url
    )  # no reply again: the same rows, so the grades hold
    assert judged(a_copy).select("id", "status", "reward").equals(before.select("id", "status", "reward"))
    dypo("grade", a_copy, "--round", 0)
    assert partition(a_copy, "grades", {"round": 0}).manifest() == grades

    recovered = serve(by_last_digit)
    told = score_again(recovered.url)
    assert f"added {silent.filter(pl.col('kind') == 'rollout').height} rows" in told.stdout
    after = judged(a_copy)
    assert {answer_shown(body)[-1] for body in recovered.requests} == {"7"}
    assert after.join(silent, on="id", how="anti").equals(before.join(silent, on="id", how="anti"))
    assert set(after.join(silent, on="id", how="semi")["status"]) == {"ok"}
    dypo("verify", a_copy)

    asked = len(recovered.requests)
    assert "nothing to do" in score_again(recovered.url).stdout
    assert judged(a_copy).equals(after)
    assert len(recovered.requests) == asked


def test_a_server_that_is_gone_when_asked_again_leaves_the_verdicts_and_what_it_still_said(
    a_copy: Path, serve: Serve
) -> None:
    def failing(n: int, body: dict) -> Answer:
        return refusal(500, "overloaded") if answer_shown(body)[-1] == "7" else by_last_digit(n, body)

    def score_again(url: str):
        return score(a_copy, url, "score.max_failed=0.5", concurrency=1, check=False)

    assert score_again(serve(failing).url).returncode == 0
    before = judged(a_copy)
    assert score_again("http://127.0.0.1:9/v1").returncode == 1
    assert judged(a_copy).equals(before)
    assert score_again(serve(lambda n, body: by_last_digit(n, body) if n < 3 else refusal(401)).url).returncode == 1
    assert 3 <= judged(a_copy).filter(pl.col("status") == "ok").height - before.filter(pl.col("status") == "ok").height < 17
    dypo("grade", a_copy, "--round", 0)
    last = serve(by_last_digit)
    assert score_again(last.url).returncode == 0
    rows = judged(a_copy)
    assert rows.filter(pl.col("status") == "error").is_empty()
    assert (
        len(last.requests)
        == rows.filter(pl.col("extracted") == "0.778").select(pl.col("detail").str.slice(0, 38)).n_unique() - 3
    )
