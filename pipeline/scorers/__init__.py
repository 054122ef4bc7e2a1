"""Verdicts: is this text's answer right? One file per scorer, a pool that outlives whatever they do.

base.py        Item and Verdict, and the ways to make one
math_answer.py exact.py choice.py gym.py user.py     the scorers: (text, gold answer) -> Verdict
judge.py       the one that asks a model: many items at a time, outside the pool
dispatch.py    verifier configuration -> scorer, gold check, version
pool.py        VerdictPool: chunks, time and memory limits, retries
clean_fork.py  the workers' multiprocessing context
warm_math.py   what they hold before they fork
"""

from pipeline.scorers.base import Item, Verdict
from pipeline.scorers.dispatch import check_gold, score_item, version, vote
from pipeline.scorers.pool import VerdictPool

__all__ = ["Item", "Verdict", "VerdictPool", "check_gold", "score_item", "version", "vote"]
