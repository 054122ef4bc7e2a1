"""A discriminator of text: how much a response reads like the teachers', as a linear score of its token n-grams.

    D(y) = w . phi(y)      phi: counts of the n-grams (n = 1 .. ngram) of y's token ids in 2^bits hashed places, as a unit vector
    w      minimises  mean over prompts of mean over (trace, rollout) of -log sigmoid(D(trace) - D(rollout))  +  l2 / 2 |w|^2

One idea: this is a logistic regression, so it is convex: `steps` steps of gradient descent over all pairs from w = 0 are a pure
function of the rows. There is nothing to seed, and rate 1 cannot diverge (a difference of two phis is at most sqrt 2 long, so the
curvature is at most 1/2 + l2). What is of the prompt alone cancels in each pair, so D reads responses only.
Left out: which sequences it sees and rates (rating.py).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from schemas.methods.terms import Discriminator

Features = tuple[np.ndarray, np.ndarray]  # places, ascending, and the value at each
_STEP, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, bits well mixed


def features(tokens: np.ndarray, settings: Discriminator) -> Features:
    """phi of a response's token ids."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    gram, grams = np.zeros(len(ids) + 1, np.uint64), []
    for n in range(1, min(settings.ngram, len(ids)) + 1):
        gram = gram[:-1] * _STEP + ids[n - 1 :]
        grams.append((gram ^ (gram >> np.uint64(32))) * _SPREAD >> np.uint64(64 - settings.bits))
    places, counts = np.unique(np.concatenate(grams or [ids]), return_counts=True)
    return places.astype(np.int64), counts / np.sqrt(np.square(counts).sum() or 1)


def fit(prompts: Sequence[tuple[Sequence[Features], Sequence[Features]]], settings: Discriminator) -> np.ndarray:
    """w for these prompts, each its traces and its rollouts; zeros where there is none to learn from."""
    w = np.zeros(1 << settings.bits)
    rows: list[Features] = []
    pairs: list[tuple[int, int, float]] = []  # trace, rollout, share of the mean
    for traces, rollouts in prompts:
        first, second = len(rows), len(rows) + len(traces)
        rows += [*traces, *rollouts]
        share = 1 / (len(prompts) * len(traces) * len(rollouts))
        pairs += [(first + t, second + r, share) for t in range(len(traces)) for r in range(len(rollouts))]
    if not pairs:
        return w
    place, value = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    row = np.repeat(np.arange(len(rows)), [len(places) for places, _ in rows])
    trace, rollout, share = (np.array(column) for column in zip(*pairs, strict=True))
    for _ in range(settings.steps):
        scores = np.bincount(row, value * w[place], len(rows))
        pull = share / (1 + np.exp(scores[trace] - scores[rollout]))  # share * sigmoid(-margin)
        pull_of_row = np.bincount(trace, pull, len(rows)) - np.bincount(rollout, pull, len(rows))
        w += np.bincount(place, value * pull_of_row[row], len(w)) - settings.l2 * w
    return w


def score(response: Features, w: np.ndarray) -> float:
    """D of a response."""
    places, values = response
    return float((values * w[places]).sum())


def model_id(w: np.ndarray, settings: Discriminator) -> str:
    """Content id of a fitted discriminator."""
    return hashlib.sha256(settings.model_dump_json().encode() + w.tobytes()).hexdigest()
