"""How many prompt tokens fit into a step without stalling running generations. Measured: machines differ a hundredfold.

Pure: durations in, a number of tokens out.
"""

from __future__ import annotations

from typing import Final

STRETCH: Final = 2.4  # a step that also reads may take this many times as long as one that only generates
# Tokens: minimum progress of a prompt, for any measurement. With fewer, a step's fixed cost would count as theirs and the
# share would never grow. llama.cpp's CPU kernels also process rows in fours.
LEAST: Final = 4
GROWTH: Final = 2  # times the last share, at most: one step measured too short must not admit a whole chunk
_WEIGHT: Final = 0.2  # of a new measurement in the running mean


class Pace:
    """Measures steps and sets the share of long prompts. most: tokens, if steps cost almost nothing. first: tokens before
    anything is measured.
    """

    def __init__(self, first: int, most: int) -> None:
        self._quiet: dict[int, float] = {}  # seconds of a step that only generates, by number of tasks
        self._token: float | None = None  # seconds that one prompt token adds
        self._last = first
        self._most = most

    def observe(self, generating: int, reading: int, seconds: float) -> None:
        """Records one step: tasks that generated, prompt tokens read beside them, and its duration."""
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
