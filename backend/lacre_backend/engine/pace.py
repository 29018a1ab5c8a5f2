"""How many prompt tokens fit into a step without stalling running answers. Measured: machines differ a hundredfold.

Rules:
- Pure: durations in, a number of tokens out. `SteadyPace` logs what should never fail.
- Prompts get the share `prefill` of a step's time: with 0.55, a step that also reads takes 2.2 times as long as one that only
  generates.
- The floor: of `REST` steps of an adapter, all but one read at least one token, however long it takes. So a prompt of `p`
  tokens that is read alone needs at most `p + p / (REST - 1) + 2` of its adapter's steps (docs/steps.md).
- The probe: one step of `REST` may read `PROBED` tokens where the share is less.
- The step at rest is measured again. Without it, an engine that reads without end would never know that other work on the
  machine has made its steps longer, and would read ever less.
- Tokens of prompts cost a fixed part, a part for each of them, and attention to all tokens before them. In a split cache
  llama.cpp computes a prompt's first token with the generated ones, and the others in a pass of their own, which reads all
  weights again. So a single token has no fixed part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from lacre.runtime import tasks

PREFILL: Final = 0.55  # of a step's time: 2.2 times as long. The goal is 2.5 for 95 of 100 steps, and steps vary
LEAST_PREFILL, MOST_PREFILL = 0.05, 0.9
GROWTH: Final = 2  # times the last share, at most: one step measured too short must not admit a whole chunk
REST: Final = 32  # steps; one of them reads nothing
PROBED: Final = 4  # tokens: tried once in `REST` steps of fewer, or their fixed part could not be told from the others
_WEIGHT: Final = 0.3  # of a new measurement in the running mean
_NOISE: Final = 0.15  # of a step's time, by which equal steps differ
_DRIFT: Final = 0.03  # by which a cost may change from one step to the next
_LEAST: Final = 1e-9  # seconds of a token, at least: none costs nothing, also if the filter says so
_BASE: Final = 0.02  # of a quiet step: a fixed part that is measured as nothing may still grow by its drift


class Pace:
    """Measures steps and sets the share of long prompts. most: tokens, if steps cost almost nothing. first: tokens before
    anything is measured. prefill: the share of a step's time.
    """

    def __init__(self, first: int, most: int, prefill: float = PREFILL) -> None:
        self._quiet: dict[int, float] = {}  # seconds of a step that only generates, by number of tasks
        self._cost: _Cost | None = None  # of reading beside it
        self._stretch = prefill / (1 - prefill)
        self._last = first
        self._most = most
        self._steps: Counter[str | None] = Counter()  # that generated, by adapter: else all rests could be one adapter's

    def observe(self, generating: int, reading: int, seconds: float, attended: int = 0) -> None:
        """Records one step: tasks that generated, prompt tokens read beside them, and its duration. attended: for each of these
        tokens those before it, added up.
        """
        if generating == 0:
            return
        if reading == 0:
            known = self._quiet.get(generating, seconds)
            self._quiet[generating] = (1 - _WEIGHT) * known + _WEIGHT * seconds
        elif (quiet := self._expected(generating)) is not None:
            added = max(seconds - quiet, 1e-6)
            if self._cost is None:
                self._cost = _Cost(reading, attended, added)
            else:
                self._cost.observe(reading, attended, added, quiet)

    def share(self, generating: int, place: int = 0, adapter: str | None = None) -> int:
        """Tokens of long prompts for the next step. 0: the step rests. place: where the prompt is that it reads.

        adapter: of the step. Rests and probes are counted for each, or all of them could be one adapter's.
        """
        self._steps[adapter] += generating > 0
        turn = self._steps[adapter] % REST if generating else 1
        if turn == 0:
            return 0
        quiet = self._expected(generating)
        if quiet is not None and self._cost is not None:
            fitting = self._cost.fitting(self._stretch * quiet, place, self._most)
            self._last = max(min(fitting, GROWTH * self._last), 1)
            if self._last < PROBED and turn == REST // 2:
                return min(PROBED, self._most)
        return self._last

    def _expected(self, generating: int) -> float | None:
        if not self._quiet:
            return None
        return self._quiet[min(self._quiet, key=lambda n: abs(n - generating))]


class SteadyPace:
    """A pace whose failure ends no engine: it only measures. The failure is logged, and measuring begins again."""

    def __init__(self, make: Callable[[], Pace]) -> None:
        self._make = make
        self._pace = make()

    def observe(self, generating: int, reading: int, seconds: float, attended: int = 0) -> None:
        try:
            self._pace.observe(generating, reading, seconds, attended)
        except Exception as error:  # noqa: BLE001 - measuring is not worth an engine, and the log has it
            self._again(error)

    def share(self, generating: int, place: int = 0, adapter: str | None = None) -> int:
        """After a failure a single token, once."""
        try:
            return self._pace.share(generating, place, adapter)
        except Exception as error:  # noqa: BLE001 - measuring is not worth an engine, and the log has it
            self._again(error)
            return 1

    def _again(self, error: Exception) -> None:
        tasks.failed("pace", error)
        self._pace = self._make()


class _Cost:
    """What tokens of prompts add to a step, in seconds. Two or more have a fixed part. Each has a part of its own, and one for
    each token before it.

    A Kalman filter of these three numbers. What the steps cannot tell apart, it divides as it learned before. A mean by token
    would count the fixed part as the tokens', and would learn too late that attention to a long text costs more.
    """

    def __init__(self, reading: int, attended: int, added: float) -> None:
        self._parts = np.array([0.0, added / reading, 0.0])
        self._known = np.diag([added / 2, added / reading, added / max(attended, 1)]) ** 2  # their covariances

    def observe(self, reading: int, attended: int, added: float, quiet: float) -> None:
        """quiet: seconds of the step without them."""
        counts = np.array([reading > 1, reading, attended], dtype=np.float64)
        self._known += np.diag((_DRIFT * self._parts + (_BASE * _DRIFT * quiet, 0.0, 0.0)) ** 2)
        shared = self._known @ counts
        weights = shared / (counts @ shared + (_NOISE * (quiet + added)) ** 2)
        self._parts = np.maximum(self._parts + weights * (added - counts @ self._parts), 0.0)
        self._known -= np.outer(weights, shared)

    def fitting(self, seconds: float, place: int, most: int) -> int:
        """As the function `fitting`."""
        fixed, token, behind = self._parts.tolist()
        return fitting((fixed, token, behind), seconds, place, most)


def fitting(cost: tuple[float, float, float], seconds: float, place: int, most: int) -> int:
    """How many tokens of a prompt from this place on cost so many seconds; at most `most`. cost: the three numbers of `_Cost`,
    none below 0.
    """
    fixed, token, behind = cost
    left, each = seconds - fixed, max(token, _LEAST) + place * behind
    if left <= 0:
        return 0
    if each * most + behind * most * most / 2 <= left:
        return most
    # fixed + each * n + behind * n * n / 2 = seconds, in a form that does not cancel
    return min(int(2 * left / (each + math.sqrt(each * each + 2 * behind * left))), most)
