"""A program at a terminal, which is a pseudo-terminal, and what it shows there."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping, Sequence


def at_terminal(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Everything that the command writes to its terminal, control characters and all, until it ends."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    shown = b""
    try:
        while piece := _read(ours):
            shown += piece
    finally:
        os.close(ours)
        process.wait(30)
    return shown.decode("utf-8", "replace")


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # what Linux says once nobody has the other end
        return b""
