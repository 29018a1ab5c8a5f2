"""Where in the cache a new task runs: beside the tasks of its adapter, and far from those of others.

Rules:
- Pure: numbers in, numbers out.
- A step computes one adapter's slots, and every slot in a gap between them costs a filler or splits the step (`scheduler.py`).
  So the tasks of an adapter must be neighbours, however the tasks of several adapters arrive.
- The first task of an adapter leaves room for the next ones: it takes the slot that is farthest from everyone else's.
"""

from __future__ import annotations

from collections.abc import Sequence


def distances(running: Sequence[bool | None]) -> list[tuple[int, int]]:
    """For each slot, how far it is from the tasks of the new one's adapter, and how far from those of others.

    running: for each slot whether its task has the adapter of the new one; None if it is idle. 0 to the own tasks: the slot is
    between two of them, or there are none. To the others it is `len(running)` if there are none.
    """
    own = [index for index, task in enumerate(running) if task is True]
    others = [index for index, task in enumerate(running) if task is False]
    return [(_outside(index, own), _nearest(index, others, len(running))) for index in range(len(running))]


def _outside(index: int, own: Sequence[int]) -> int:
    return max(own[0] - index, index - own[-1], 0) if own else 0


def _nearest(index: int, others: Sequence[int], none: int) -> int:
    return min((abs(index - other) for other in others), default=none)
