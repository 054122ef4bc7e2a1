"""How far one side's memory rises above its imports and its loaded model, over two updates, in a process of its own.

    python -m tests.bench.memory SIDE CASE BATCH MODEL SHARDS      prints megabytes; SIDE is trl or ours

One idea: the high-water mark is reset once everything is loaded and the training loop stands before its first update; the second
update is there because only then the optimizer's moments are held beside the activations. SHARDS is a Parquet file.
"""

import subprocess
import sys
from pathlib import Path

from tests.bench.machine import peak_mb, pin, reset_peak, resident_mb


def measure(side: str, case: str, batch: int, model: Path, shards: Path) -> float:
    """Megabytes, from a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.memory", side, case, str(batch), str(model), str(shards)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    side, name, batch, model, shards = sys.argv[1:]
    pin()
    import pyarrow.parquet as pq
    from transformers.utils import logging

    from tests.bench.case import CASES

    if side == "trl":
        from tests.bench.trl_peer import Peer as Side
    else:
        from tests.bench.ours import Ours as Side
    logging.disable_progress_bar()
    trained = Side(Path(model), pq.read_table(shards), CASES[name], batch=int(batch))
    held = resident_mb()
    reset_peak()
    trained.update()
    trained.update()
    print(peak_mb() - held)


if __name__ == "__main__":
    main()
