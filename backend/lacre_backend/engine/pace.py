"""How much of a long prompt fits into a step without stalling those who generate. Measured: machines differ a hundredfold.

Pure: durations in, a number of tokens out.
"""

from __future__ import annotations

from typing import Final

STRETCH: Final = 2.4  # a step that also reads may take so many times as long as one that only generates
# Tokens: a prompt gets on, whatever was measured. With fewer, all that a step costs besides would be taken for theirs, and they
# would never become more; and llama.cpp's kernels for CPUs take rows by fours.
LEAST: Final = 4
GROWTH: Final = 2  # times the last share, at most: one step that was measured too short must not let a whole chunk in
_WEIGHT: Final = 0.2  # of a new measurement in the running mean


class Pace:
    """most: tokens, where steps cost next to nothing. first: before anything was measured."""

    def __init__(self, first: int, most: int) -> None:
        self._quiet: dict[int, float] = {}  # seconds of a step that only generates, by how many do
        self._token: float | None = None  # seconds that one token of a prompt adds
        self._last = first
        self._most = most

    def observe(self, generating: int, reading: int, seconds: float) -> None:
        """One step: tasks that generated, tokens of prompts beside them, and how long it took."""
        if generating == 0:
            return
        if reading == 0:
            self._quiet[generating] = _mean(self._quiet.get(generating), seconds)
        elif (quiet := self._expected(generating)) is not None:
            self._token = _mean(self._token, max(seconds - quiet, 1e-6) / reading)

    def share(self, generating: int) -> int:
        """Tokens of long prompts for the next step."""
        quiet = self._expected(generating)
        if quiet is not None and self._token is not None:
            fitting = int((STRETCH - 1) * quiet / self._token)
            self._last = max(min(fitting, GROWTH * self._last, self._most), LEAST)
        return self._last

    def _expected(self, generating: int) -> float | None:
        if not self._quiet:
            return None
        return self._quiet[min(self._quiet, key=lambda n: abs(n - generating))]


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - _WEIGHT) * mean + _WEIGHT * value
