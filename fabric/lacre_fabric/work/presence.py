"""Who is there: what workers say of themselves once a second, and what a gateway remembers of it.

Rules:
- A worker chooses every byte of it. Counts, names and their number are bounded where they are parsed. So is how many workers
  a pool can seem to have: neither memory, nor labels of metrics, nor a sum over all of them grows with what one worker says.
- A pool's workers are kept apart from the others': who floods a pool's roster makes no other pool's slower.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre_fabric.work.contract import PRESENT_FOR, Capacity

MAX_BYTES: Final = 64 * 1024  # of one sign of presence: the names of a node's models and the fingerprints of its keys
MAX_SLOTS: Final = 2**16  # of one worker, busy or free: no engine decodes so many streams at once
MAX_MODELS: Final = 1024  # that one worker says it serves
MAX_MODEL: Final = 180  # characters of a model's name: no more fit a subject
MAX_KEYS: Final = 1024  # that one worker says it holds: a pool has a few, and the older ones until they are destroyed
MAX_KEY: Final = 128  # characters of a key's fingerprint; ours have 64
MAX_NODES: Final = 4096  # of one pool, in all regions
MAX_REGIONS: Final = 64  # of one pool
MAX_REASONS: Final = 16  # that one worker gives for taking no work: there are some ten kinds
WRONG: Final = "wrong"  # in a worker's presence: the kinds of what keeps it from working
ROOM: Final = "room"  # in a worker's presence: its free slots by model; a worker of before does not say it
KEYS: Final = "keys"  # in a worker's presence: the fingerprints of the keys that it holds


_KIND: Final = re.compile(r"[a-z_]{1,32}")  # they end in a terminal


@dataclass(frozen=True, slots=True)
class Presence:
    """models: those that it takes work for now. busy, free: its slots. room: of these, how many are free for each model; `free`
    for one that it does not name.
    """

    models: frozenset[str]
    busy: int
    free: int
    room: Mapping[str, int] = field(default_factory=dict)

    def free_for(self, model: str) -> int:
        return min(self.free, self.room.get(model, self.free))

    @classmethod
    def parse(cls, data: bytes) -> Presence:
        """Raises InvalidMessage."""
        members = _members(data)
        models = _texts(members, "models", MAX_MODELS, MAX_MODEL)
        return cls(models, _slots(members, "busy"), _slots(members, "free"), _room(members, models))


def keys_in(data: bytes) -> frozenset[str]:
    """The fingerprints of the keys that a sign of presence names. Raises InvalidMessage."""
    return _texts(_members(data), KEYS, MAX_KEYS, MAX_KEY)


def wrong_in(data: bytes) -> frozenset[str]:
    """What keeps a worker from working, by a sign of its presence. Raises InvalidMessage."""
    kinds = _texts(_members(data), WRONG, MAX_REASONS, 32)
    if not all(map(_KIND.fullmatch, kinds)):
        raise InvalidMessage(f"presence: member {WRONG!r} must have words alone")
    return kinds


def _members(data: bytes) -> Members:
    if len(data) > MAX_BYTES:
        raise InvalidMessage("a sign of presence that is too long")
    return Members.parse(data, "presence")


def _slots(members: Members, name: str) -> int:
    count = members.count(name)
    if count > MAX_SLOTS:
        raise InvalidMessage(f"presence: member {name!r} must be {MAX_SLOTS} at most")
    return count


def _room(members: Members, models: frozenset[str]) -> dict[str, int]:
    """Of the models that it serves alone."""
    said = members.counts(ROOM)
    return {model: min(said[model], MAX_SLOTS) for model in models & said.keys()}


def _texts(members: Members, name: str, number: int, length: int) -> frozenset[str]:
    texts = members.texts(name)
    if len(texts) > number or any(len(text) > length for text in texts):
        raise InvalidMessage(f"presence: member {name!r} must have {number} entries of {length} characters at most")
    return frozenset(texts)


class Roster:
    """The workers of one pool that were heard of in the last `PRESENT_FOR` seconds."""

    def __init__(self) -> None:
        # By region and node, who was heard last at the end: until when it counts, on the monotonic clock.
        self._nodes: dict[tuple[str, str], tuple[float, Presence]] = {}
        self._regions: Counter[str] = Counter()  # how many of them are in each

    def hear(self, region: str, node: str, presence: Presence) -> bool:
        """False where the pool seems to have too many workers or regions already: those that are known stay."""
        self._forget()
        known = self._nodes.pop((region, node), None)
        if known is None:
            if len(self._nodes) >= MAX_NODES or (region not in self._regions and len(self._regions) >= MAX_REGIONS):
                return False
            self._regions[region] += 1
        self._nodes[region, node] = time.monotonic() + PRESENT_FOR, presence
        return True

    def live(self) -> Mapping[tuple[str, str], Presence]:
        """By region and node."""
        self._forget()
        return {at: presence for at, (_, presence) in self._nodes.items()}

    def capacity(self) -> dict[str, Capacity]:
        """By region. A worker that drains serves no model and counts for nothing."""
        found: dict[str, Capacity] = {}
        for (region, _), said in self.live().items():
            if said.models:
                at = found.get(region, Capacity())
                found[region] = Capacity(at.workers + 1, at.busy + said.busy, at.free + said.free)
        return found

    def free(self, model: str) -> dict[str, int]:
        """The free slots of the workers that serve the model, by region; without those where nobody does."""
        found: dict[str, int] = {}
        for (region, _), said in self.live().items():
            if model in said.models:
                found[region] = found.get(region, 0) + said.free_for(model)
        return found

    def _forget(self) -> None:
        now = time.monotonic()
        while self._nodes and self._nodes[oldest := next(iter(self._nodes))][0] <= now:
            del self._nodes[oldest]
            self._regions[oldest[0]] -= 1
            if not self._regions[oldest[0]]:
                del self._regions[oldest[0]]
