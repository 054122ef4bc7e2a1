"""The two ways a command ends badly, with their exit codes.

A message names the file, the row or key, what was expected, what was found and the way out.
"""

INTERRUPTED = 130  # the exit code after a Ctrl-C


class DypoError(Exception):
    """Work began and failed: what was finished is kept. The command exits with 1."""

    exit_code = 1


class WorkError(DypoError):
    """Alias with a name for call sites: a server that is down, too many failed rows, a full disk."""


class UserError(DypoError):
    """Refused before any work: usage, recipe, input data, an altered or foreign table. Exits with 2."""

    exit_code = 2


class Reported(DypoError):
    """A process that this one started ended badly and said why; nothing is left to say but its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process ended with exit code {exit_code}")
        self.exit_code = exit_code
