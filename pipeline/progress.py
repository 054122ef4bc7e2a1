"""Progress: a live bar with rate and time left on a terminal, a plain line every few seconds in a pipe. Always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts units of work. `done` may start above 0: the rest is what a rate is computed from."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "rows") -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._first, self._began, self._told = done, time.monotonic(), time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            self._bar = Rich(
                TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, n: int, note: str = "") -> None:
        self.to(self.done + n, note)

    def to(self, done: int, note: str = "") -> None:
        """Sets the count; `note` is one short line of numbers."""
        self.done = done
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        text = f"{rate:,.1f} {self.unit}/s {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=text)
        elif time.monotonic() - self._told >= 5.0:
            left = (self.total - done) / rate if rate > 0 else float("inf")
            self._told = time.monotonic()
            print(f"{self.label}: {done}/{self.total} {text}, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(label: str, total: int, done: int = 0, unit: str = "rows") -> Iterator[Progress]:
    p = Progress(label, total, done, unit)
    try:
        yield p
    finally:
        p.close()
