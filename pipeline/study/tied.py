"""A command that ends with the process that started it, however that ends. The command asks for it itself, as its first act:
nothing has to happen between fork and exec, where a program with threads may do hardly anything.
"""

import ctypes
import os
import signal
import sys

TIED = "DYPO_TIED_TO"  # environment variable: the process id of who started the command


def end_with_starter() -> None:
    """For a command that was started with TIED: from now on it is killed when its starter is gone (Linux)."""
    starter = os.environ.pop(TIED, None)
    if starter is None or sys.platform != "linux":
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(starter):  # it was gone before
        os._exit(128 + signal.SIGKILL)
