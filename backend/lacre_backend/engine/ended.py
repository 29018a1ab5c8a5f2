"""Says how a process ended."""

from __future__ import annotations

import signal


def how(code: int) -> str:
    """code: as `subprocess` gives it. A signal's name or number, or the exit code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # one of the real-time signals, which have no names
        return f"signal {-code}"
