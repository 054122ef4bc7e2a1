"""What the last bits of a number depend on besides its inputs: kernels are chosen by version, processor and threads.

One idea: whoever compares two runs bitwise first compares these. Left out: what the recipe says already (dtype, seed).
"""

import platform
from pathlib import Path

import torch
import transformers

from schemas.recipe import Policy
from trainer.model import device_of


def environment(policy: Policy) -> dict[str, str | int]:
    """Versions, device, processor and threads of this process, for a manifest or a golden file."""
    device = device_of(policy)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def _cpu() -> str:
    """The processor's model as Linux names it, else as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
