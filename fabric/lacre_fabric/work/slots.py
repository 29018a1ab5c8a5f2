"""How much of a worker is taken: sequences by model, and how many more of each it may pull.

Rules
- Pure: no I/O, no clock, no waiting.
- A model is pulled for only while one of its own slots is free. What one model has beyond its slots takes none of another's.
- A delivery counts as one sequence until its request says how many it is; the count falls as they end. It may be more than
  there are slots: then nothing more of its model is pulled until as many have ended.
- Whoever opens requests may say that a delivery's count is not known yet. Until it is, nothing more of its model is pulled: a
  burst of requests of sixteen sequences each would be taken for as many single ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Taken:
    model: str
    sequences: int | None  # None: not known yet


def shares(total: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Of `total` sequences, how many each model may have, in proportion to what its engine runs at a time; one at least."""
    together = sum(wanted.values())
    return {model: max(1, total * slots // together) for model, slots in wanted.items()}


class Slots:
    """total: sequences at a time. each: of each model; all that there are for one that it does not name."""

    def __init__(self, total: int, models: Sequence[str], each: Mapping[str, int] | None = None) -> None:
        given = each or {}
        self.total = total
        self._each = {model: min(given.get(model, total), total) for model in models}
        self._taken: dict[str, _Taken] = {}
        self._pulling: set[str] = set()

    # What is known

    @property
    def busy(self) -> int:
        """Slots that deliveries hold."""
        return min(self.total, sum(self._held(model) for model in self._each))

    def free(self, model: str) -> int:
        """Slots that a new request of the model would find, those of pulls that wait among them."""
        return max(0, min(self._each.get(model, 0) - self._held(model), self.total - self.busy))

    def may_pull(self, model: str) -> bool:
        known = all(taken.sequences is not None for taken in self._taken.values() if taken.model == model)
        return known and model not in self._pulling and self.free(model) > 0 and self.busy + len(self._pulling) < self.total

    # What changes

    def pull(self, model: str) -> None:
        """One pull for it waits, and holds a slot; one at a time."""
        self._pulling.add(model)

    def pulled(self, model: str) -> None:
        self._pulling.discard(model)

    def take(self, attempt: str, model: str) -> None:
        """A delivery holds a slot from now on."""
        self._taken[attempt] = _Taken(model, 1)

    def weigh(self, attempt: str, sequences: int | None) -> None:
        """How many a delivery is now; None: not known yet. One that was given back already is no error."""
        if attempt in self._taken:
            self._taken[attempt].sequences = None if sequences is None else max(1, sequences)

    def give(self, attempt: str | None) -> None:
        """A delivery is over; None: the oldest one. Idempotent."""
        if attempt is None:
            attempt = next(iter(self._taken), None)
        if attempt is not None:
            self._taken.pop(attempt, None)

    def _held(self, model: str) -> int:
        """Slots of its own that the model has taken."""
        used = sum(1 if taken.sequences is None else taken.sequences for taken in self._taken.values() if taken.model == model)
        return min(used, self._each.get(model, 0))
