"""Importing this makes math-verify ready: its first call loads grammars and compiles patterns for half a second.

The pool has its fork server import it once, so that no worker, and no verdict's time limit, pays
for it.
"""

from pipeline.scorers.math_answer import warm_up

warm_up()
