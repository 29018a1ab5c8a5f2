"""What workers did for each model: the counts that they announce with their presence, and the gateway's sums of them.

Rules:
- A worker controls every byte of its counts. The parser bounds numbers and models, and the sums bound their keys. Counts are
  for graphs alone: nothing is decided or charged by them. Receipts are for that.
- A worker's counts begin at zero when it starts, and grow. A smaller count is a new start. A worker that was not known yet adds
  nothing at first, so that a gateway's start makes no leap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members

# Seconds: the boundaries that OpenTelemetry's conventions for generative AI give gen_ai.server.time_to_first_token.
FIRST_OUTPUT: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
MAX_COUNTED: Final = 64  # models of one worker with counts: bounds its messages and the gateway's memory
MAX_COUNT: Final = 2**53  # JSON's readers agree on integers up to here; a thousand years of tokens
MAX_SUMS: Final = 4096  # models and regions of one pool
_BUCKETS: Final = len(FIRST_OUTPUT) + 1
_PLACES: Final = {str(i): i for i in range(_BUCKETS)}


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """running: requests at the worker now. prompt, cached, generated: tokens; cached ones are among the prompt's.

    first_output: how many answers had their first token within each boundary of `FIRST_OUTPUT`, or later. seconds: their sum.
    """

    running: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    first_output: tuple[int, ...] = (0,) * _BUCKETS
    seconds: float = 0.0

    def encode(self) -> dict[str, object]:
        return {
            "running": self.running,
            "prompt": self.prompt,
            "cached": self.cached,
            "generated": self.generated,
            "first_output": {str(i): count for i, count in enumerate(self.first_output) if count},
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def parse(cls, members: Members) -> Self:
        """Raises InvalidMessage."""
        running, prompt, cached, generated = (_bounded(members, name) for name in ("running", "prompt", "cached", "generated"))
        said, seconds = members.counts("first_output"), members.time("seconds")
        if not said.keys() <= _PLACES.keys() or not all(count <= MAX_COUNT for count in (*said.values(), abs(seconds))):
            raise InvalidMessage(f"first_output must have {_BUCKETS} places with counts of {MAX_COUNT} at most")
        counts = tuple(said.get(place, 0) for place in _PLACES)
        return cls(running, prompt, cached, generated, counts, max(0.0, seconds))

    def since(self, before: Self) -> ModelCounts:
        """The difference to `before`; this one whole, if the worker started again meanwhile."""
        grown = (
            self.prompt >= before.prompt and self.cached >= before.cached and self.generated >= before.generated
            and self.seconds >= before.seconds and all(map(int.__ge__, self.first_output, before.first_output))
        )  # fmt: skip
        return self.plus(before, -1) if grown else self

    def plus(self, other: ModelCounts, times: int = 1) -> ModelCounts:
        """The sum of the counters. `running` is this one's."""
        return ModelCounts(
            self.running,
            self.prompt + times * other.prompt,
            self.cached + times * other.cached,
            self.generated + times * other.generated,
            tuple(mine + times * theirs for mine, theirs in zip(self.first_output, other.first_output, strict=True)),
            math.fsum((self.seconds, times * other.seconds)),
        )


def _bounded(members: Members, name: str) -> int:
    count = members.count(name)
    if count > MAX_COUNT:
        raise InvalidMessage(f"{name} must be {MAX_COUNT} at most")
    return count


def parse_counts(members: Members, name: str, longest: int) -> dict[str, ModelCounts]:
    """Empty if the member is missing, or has a form of another version: counts keep no worker away.

    longest: characters of a model's name.
    """
    try:
        said = members.named_objects(name)
        if len(said) > MAX_COUNTED or any(len(model) > longest for model in said):
            return {}
        return {model: ModelCounts.parse(counts) for model, counts in said.items()}
    except InvalidMessage:
        return {}


@dataclass(slots=True)
class ModelSums:
    """The counts of a pool's workers, summed by region and model over their starts and ends."""

    _last: dict[tuple[str, str], Mapping[str, ModelCounts]] = field(default_factory=dict)  # by region and node
    _sums: dict[tuple[str, str], ModelCounts] = field(default_factory=dict)  # by region and model

    def hear(self, region: str, node: str, counts: Mapping[str, ModelCounts]) -> None:
        """A live worker's latest counts. It may leave all of them out, if its message would be too long."""
        if not counts and (region, node) in self._last:
            return
        before = self._last.get((region, node))
        self._last[region, node] = counts
        for model, now in counts.items():
            at = region, model
            if at not in self._sums and len(self._sums) >= MAX_SUMS:
                continue
            added = ModelCounts() if before is None else now.since(before.get(model, ModelCounts()))
            self._sums[at] = self._sums.get(at, ModelCounts()).plus(added)

    def forget(self, region: str, node: str) -> None:
        """The worker is no longer live. Its work stays in the sums."""
        self._last.pop((region, node), None)

    def total(self) -> dict[tuple[str, str], ModelCounts]:
        """By region and model; `running` of the live workers."""
        running: dict[tuple[str, str], int] = {}
        for (region, _), counts in self._last.items():
            for model, now in counts.items():
                running[region, model] = running.get((region, model), 0) + now.running
        return {at: ModelCounts(running.get(at, 0)).plus(found) for at, found in self._sums.items()}
