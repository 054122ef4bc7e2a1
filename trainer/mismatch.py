"""What ends a round before an update: numbers that are not finite, and the behaviour check, that right after sampling the trainer
must see the log-probs that the sampler stored.

One idea: the check costs no forward. Before a round's first update the policy still is the one that sampled the round's own rollouts, so
the log-probs that the update computes anyway must be the sampler's, but for rounding. If they are not, ratios, clipping and
advantages all speak of another distribution (ALGORITHMS section 8, test 23). Left out: `dypo audit logprobs`, which looks at
every row of a round.
"""

import math
from collections.abc import Sequence

import numpy as np

from schemas.errors import WorkError
from trainer.metrics import sampler_gaps
from trainer.objective import Unit
from trainer.step import Observed

SHOWN = 5


def refuse_mismatch(seen: Observed, *, limit: float, where: str) -> None:
    """WorkError if the mean |log-prob - sampler's| over the tokens of age-0 rows is above `limit` nats.

    `seen`: of an update before which none was made in its round. `where` begins the message. Older rows do not count: another
    policy sampled them.
    """
    fresh = [(row, gap_T) for row, gap_T in zip(seen.rl_rows, sampler_gaps(seen), strict=True) if row.age == 0]
    if not fresh:
        return
    found = float(np.abs(np.concatenate([gap_T for _, gap_T in fresh])).mean())
    if found <= limit:
        return
    worst = sorted(fresh, key=lambda pair: -np.abs(pair[1]).mean())[:SHOWN]
    listed = ", ".join(f"{row.item_id} ({np.abs(gap_T).mean():.3g})" for row, gap_T in worst)
    raise WorkError(
        f"{where}: freshly sampled rollouts have log-probs that differ from the trainer's by {found:.3g} nats a token on average, "
        f"expected at most train.max_logprob_difference = {limit:g}; the update was not made. Worst rows: {listed}. Look with "
        "`dypo audit logprobs`; then generate the rollouts again, or raise train.max_logprob_difference"
    )


def refuse_non_finite(seen: Observed, units: Sequence[Unit], *, where: str) -> None:
    """WorkError if the loss or the gradient's norm is not a finite number: the items that made it so, if that can be told."""
    if math.isfinite(seen.total) and math.isfinite(seen.grad_norm):
        return
    items = seen.broken or [row.item_id for unit in units for row in unit]
    listed = ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
    raise WorkError(
        f"{where}: loss {seen.total} and gradient norm {seen.grad_norm} are not both finite; the update was not made. Items: {listed}. "
        "Checkpoints are kept; lower train.method.lr, or look at these rows with `dypo sql`"
    )
