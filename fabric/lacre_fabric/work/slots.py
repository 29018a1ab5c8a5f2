"""Counts a worker's slots: sequences in use by model, and how many more it may pull.

Rules:
- Pure: no I/O, no clock, no waiting.
- A worker pulls for a model only while one of the model's own slots is free. Sequences beyond a model's slots take none of
  another model's.
- A delivery counts as one sequence until its request is opened and counted. The count falls as sequences end. It may exceed the
  slots: then the worker pulls nothing for that model until enough have ended.
- Models of one engine, such as adapters of one base, share its slots. What is said of a model's slots is then of all of them.
- While a delivery's count is not known, the worker pulls nothing for its model. Otherwise it would take a burst of requests of
  sixteen sequences each for single ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Taken:
    model: str
    sequences: int | None  # None: not known yet


def shares(total: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Each model's share of `total` sequences, in proportion to its engine's parallel sequences; at least one."""
    together = sum(wanted.values())
    return {model: max(1, total * slots // together) for model, slots in wanted.items()}


class Slots:
    """The slots of one worker. total: parallel sequences. each: slots by model; a model not in it may use all.

    sharing: models that use another one's slots, and that one.
    """

    def __init__(
        self,
        total: int,
        models: Sequence[str],
        each: Mapping[str, int] | None = None,
        sharing: Mapping[str, str] | None = None,
    ) -> None:
        self._sharing = sharing or {}
        models = [model for model in models if model not in self._sharing]
        given = each or {}
        self.total = total
        self._each = {model: min(given.get(model, total), total) for model in models}
        self._taken: dict[str, _Taken] = {}
        self._pulling: set[str] = set()

    # State

    @property
    def busy(self) -> int:
        """Slots that deliveries hold."""
        return min(self.total, sum(self._held(model) for model in self._each))

    def free(self, model: str) -> int:
        """Slots available to a new request of the model. A waiting pull does not occupy one."""
        owner = self._owner(model)
        return max(0, min(self._each.get(owner, 0) - self._held(owner), self.total - self.busy))

    def roomy(self, models: Sequence[str]) -> bool:
        """Whether each of the models can have a pull at once."""
        wanted = Counter(map(self._owner, models))
        return self.total - self.busy >= len(models) and all(self.free(owner) >= n for owner, n in wanted.items() if n > 1)

    def may_pull(self, model: str) -> bool:
        owner = self._owner(model)
        known = all(taken.sequences is not None for taken in self._taken.values() if taken.model == owner)
        beside = sum(self._owner(other) == owner for other in self._pulling)
        room = self.free(owner) > beside and self.busy + len(self._pulling) < self.total
        return known and model not in self._pulling and room

    def may_take(self, model: str) -> bool:
        """Whether the model has a free slot for work that was not pulled. A waiting pull does not occupy it."""
        owner = self._owner(model)
        known = all(taken.sequences is not None for taken in self._taken.values() if taken.model == owner)
        return known and self.free(model) > 0

    # Changes

    def pull(self, model: str) -> None:
        """A pull for the model starts waiting. It reserves a slot; there is one pull per model at a time."""
        self._pulling.add(model)

    def pulled(self, model: str) -> None:
        self._pulling.discard(model)

    def take(self, attempt: str, model: str) -> None:
        """A delivery occupies a slot from now on."""
        self._taken[attempt] = _Taken(self._owner(model), 1)

    def weigh(self, attempt: str, sequences: int | None) -> None:
        """Sets a delivery's sequences; None: not known yet. Does nothing if the delivery was given back."""
        if attempt in self._taken:
            self._taken[attempt].sequences = None if sequences is None else max(1, sequences)

    def give(self, attempt: str | None) -> None:
        """Frees a delivery's slots; None: the oldest delivery's. Idempotent."""
        if attempt is None:
            attempt = next(iter(self._taken), None)
        if attempt is not None:
            self._taken.pop(attempt, None)

    def _owner(self, model: str) -> str:
        """The model whose slots it uses: itself, unless it shares another one's."""
        return self._sharing.get(model, model)

    def _held(self, model: str) -> int:
        """The model's own slots that are in use."""
        used = sum(1 if taken.sequences is None else taken.sequences for taken in self._taken.values() if taken.model == model)
        return min(used, self._each.get(model, 0))
