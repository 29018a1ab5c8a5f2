"""Runs a child process that dies with its parent, even after SIGKILL.

    python -m lacre_fabric.operate.leash PARENT_PID COMMAND [ARGUMENT...]

It sets the child's parent-death signal (Linux, prctl(2) PR_SET_PDEATHSIG), which survives the exec that follows. Then it checks
that the parent is still alive. The kernel sends the signal when the *thread* that forked ends, so start children from a thread
that lives as long as the process. On other systems the command simply runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

# `-P`: with only `-m`, a file in the current folder could replace one of our modules.
PYTHON: Final = (sys.executable, "-P")
_PR_SET_PDEATHSIG: Final = 1


def leashed(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` as a child of this process, on a leash."""
    return [*PYTHON, "-m", "lacre_fabric.operate.leash", str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> None:
    parent, command = int(arguments[0]), list(arguments[1:])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent:  # it died before the signal was set
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - the caller's own command, without a shell


if __name__ == "__main__":
    main(sys.argv[1:])
