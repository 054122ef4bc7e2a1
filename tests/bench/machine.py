"""One core, its clock, its matmul peak, and how high memory rose. Linux only.

One idea: `pin` runs before torch is imported, so that no thread pool is ever larger than one. One thread on one core that only
computes takes as much wall time as processor time, but on a busy machine only the second still says something about it.
"""

import os
import re
import time
from pathlib import Path


def pin() -> int:
    """This process to one core and its libraries to one thread; returns the core. Call it before importing torch."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    return core


class Clock:
    """Seconds of wall time, or of this process's processor time."""

    read = staticmethod(time.perf_counter)

    @classmethod
    def count_processor_time(cls) -> None:
        cls.read = staticmethod(time.process_time)


def matmul_gflops(size: int = 1024, tries: int = 3) -> float:
    """The best of a few square float32 products, in GFLOP/s."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = float("inf")
    for _ in range(tries):
        began = Clock.read()
        torch.mm(a, b, out=out)
        best = min(best, Clock.read() - began)
    return 2 * size**3 / best / 1e9


def resident_mb() -> float:
    """Memory held now."""
    return _status("VmRSS")


def peak_mb() -> float:
    """The most memory held since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Forgets the highest mark, which imports may have set."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024
