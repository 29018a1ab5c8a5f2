"""Decides which adapter computes the next step: llama.cpp applies an adapter to a whole step.

Rules:
- Pure: no I/O, no clock, no thread, no llama.cpp.
- An adapter keeps its turn for `TURN` steps, while it has work. Tenants choose the next one in turn, and so do the callers of
  a tenant. A caller's choice is the one of its adapters that was used longest ago.
- So a caller gets no larger share by using several adapters, and no adapter with work starves.
- The bound: a caller that is alone with A adapters waits at most `TURN * (A - 1)` steps between two of an adapter's. With T
  tenants of at most C callers each, `TURN * A * C * T`. A step's own length is bounded by `pace.py`.
- A party whose tasks share a step that another party chose keeps its own choice. Otherwise an adapter could starve.
- A newcomer chooses last. So no one gains by arriving often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre_backend.engine.turns import Fair

# Steps. A change of the adapter makes llama.cpp plan its memory again. `bench/adapters.py` measures 3 ms with 30 layers, a
# seventh of a step of 4 sequences: so changes take 4 % of the time
TURN: Final = 4


@dataclass(frozen=True, slots=True)
class Runner:
    """A task with something to compute. adapter: None for the base. number: of its admission, for its age."""

    adapter: str | None
    fair: Fair
    number: int


class AdapterTurns:
    """The turns so far, by a counter of steps."""

    def __init__(self) -> None:
        self._count = 0
        self._current: str | None = None
        self._left = 0  # steps of the current turn
        self._tenants: dict[str, int] = {}  # when each one with work chose last
        self._callers: dict[Fair, int] = {}
        self._adapters: dict[str | None, int] = {}  # when each one began its last turn

    def next(self, runners: Sequence[Runner]) -> str | None:
        """The adapter of the next step, which is then taken. None for the base, and if nothing runs."""
        adapters = {runner.adapter for runner in runners}
        self._count += 1
        if len(adapters) < 2:
            self._tenants.clear()
            self._callers.clear()
            self._begin(next(iter(adapters), None))
            return self._current
        self._tenants = {runner.fair[0]: self._tenants.get(runner.fair[0], self._count) for runner in runners}
        self._callers = {runner.fair: self._callers.get(runner.fair, self._count) for runner in runners}
        if self._current not in adapters or self._left == 0:
            self._count += 1  # after the newcomers
            chosen = min(runners, key=self._order)
            self._begin(chosen.adapter)
            self._tenants[chosen.fair[0]] = self._callers[chosen.fair] = self._count
        self._left -= 1
        return self._current

    def _begin(self, adapter: str | None) -> None:
        self._current, self._left = adapter, TURN
        self._adapters[adapter] = self._count

    def _order(self, runner: Runner) -> tuple[int, int, int, int]:
        used = self._adapters.get(runner.adapter, 0)
        return self._tenants[runner.fair[0]], self._callers[runner.fair], used, runner.number
