"""The demo's claim: with four teachers, DYPO raises the embedded policy by at least 10 points, mean of 3 seeds."""

from pathlib import Path

import pytest

from tests.tiny_runs import ROOT, dypo, table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_raises_avg_at_4_on_fresh_sums_by_ten_points_over_three_seeds(tmp_path: Path) -> None:
    gains = []
    for seed in range(3):
        run = tmp_path / f"seed{seed}"
        dypo("run", ROOT / "recipes" / "tiny.toml", "--set", f"run='{run}'", "--set", f"seed={seed}", timeout=600)
        evals = table(run, "evals")
        avg = evals.filter((evals["suite"] == "fresh_sums") & (evals["metric"] == "avg@4")).sort("round")["value"].to_list()
        gains.append(100 * (avg[-1] - avg[0]))
    print("gains in points:", gains)
    assert sum(gains) / 3 >= 10
