"""Presence: the state that workers announce once a second, and what a gateway remembers of it.

Rules:
- A worker controls every byte of its presence. The parser bounds counts, names and their number, and the roster bounds workers
  per pool. So one worker cannot inflate the gateway's memory, metric labels or sums.
- Each pool has its own roster: a flood in one pool does not slow another's.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.jose.formats import Format
from lacre.jose.jws import b64u
from lacre_fabric.work.contract import PRESENT_FOR, Capacity, SeenWorker
from lacre_fabric.work.model_counts import ModelCounts, ModelSums, parse_counts

PRESENCE: Final = Format("presence", "gateway or command")
MAX_BYTES: Final = 64 * 1024  # of one presence message: the names of a node's models and the fingerprints of its keys
MAX_SLOTS: Final = 2**16  # of one worker, busy or free: no engine decodes so many streams at once
MAX_MODELS: Final = 1024  # that one worker may announce
MAX_MODEL: Final = 180  # characters of a model's name: a longer one does not fit a subject
MAX_KEYS: Final = 1024  # that one worker may announce: a pool has a few, plus older ones until they are destroyed
MAX_KEY: Final = 128  # characters of a key's fingerprint; ours have 64
MAX_NODES: Final = 4096  # of one pool, in all regions
MAX_REGIONS: Final = 64  # of one pool
MAX_REASONS: Final = 16  # that one worker may give for taking no work; about ten exist
WRONG: Final = "wrong"  # member of a presence message: the kinds of faults that keep the worker from working
ROOM: Final = "room"  # member of a presence message: its free slots by model; older workers omit it
COUNTS: Final = "counts"  # member of a presence message: its work by model, for metrics; older workers omit it
OFFERS: Final = "offers"  # member of a presence message: whether it takes work that is offered to it; older workers omit it
KEYS: Final = "keys"  # member of a presence message: the fingerprints of the keys that it holds
VERSION: Final = "version"  # member of a presence message: the worker's program; older workers, which obey no orders, omit it
DRAINED: Final = "drained"  # a kind of fault: a gateway ordered the worker to take no work


_KIND: Final = re.compile(r"[a-z_]{1,32}")  # they are shown in a terminal
_VERSION: Final = re.compile(r"[0-9A-Za-z.+-]{1,32}")


@dataclass(frozen=True, slots=True)
class Presence:
    """A presence message. models: those it takes work for now. busy, free: its slots. room: free slots by model; `free` applies
    to a model not in it. counts: its work, of models that have some. offers: whether it takes offered work. version: of its
    program; empty if it does not say. drained: whether a gateway ordered it to take no work. keys: as `keys_in`.
    """

    models: frozenset[str]
    busy: int
    free: int
    room: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, ModelCounts] = field(default_factory=dict)
    offers: bool = False
    version: str = ""
    drained: bool = False
    keys: frozenset[str] = frozenset()

    @property
    def slots(self) -> tuple[object, ...]:
        """All that decides where work goes."""
        return self.models, self.free, self.room

    @property
    def seen(self) -> SeenWorker:
        """Of its models together."""
        counts = self.counts.values()
        return SeenWorker(
            models=tuple(sorted(self.models)), busy=self.busy, free=self.free, prompt=sum(one.prompt for one in counts),
            cached=sum(one.cached for one in counts), generated=sum(one.generated for one in counts), version=self.version,
            drained=self.drained, hears=self.offers and bool(self.version), keys=self.keys,
        )  # fmt: skip

    def free_for(self, model: str) -> int:
        return min(self.free, self.room.get(model, self.free))

    @classmethod
    def parse(cls, data: bytes) -> Presence:
        """Raises InvalidMessage."""
        members = _members(data)
        models = _texts(members, "models", MAX_MODELS, MAX_MODEL)
        counts = parse_counts(members, COUNTS, MAX_MODEL)
        free, offers = _slots(members, "free"), members.get(OFFERS) is True
        version = members.get(VERSION)
        known = version if isinstance(version, str) and _VERSION.fullmatch(version) else ""
        drained, keys = DRAINED in _shown(members, WRONG, MAX_REASONS, 32), _shown(members, KEYS, MAX_KEYS, MAX_KEY)
        return cls(models, _slots(members, "busy"), free, _room(members, models), counts, offers, known, drained, keys)


def receipts_by(key: str, receipt_key: bytes) -> str:
    """Among the fingerprints: that this worker signs receipts of requests for `key` with this receipt key."""
    return f"{key}+{b64u(receipt_key)}"


def accepts_grants_of(gateway_key: bytes) -> str:
    """Among the fingerprints: that this worker's manifest has this key of the gateways."""
    return f"grants+{b64u(gateway_key)}"


def keys_in(data: bytes) -> frozenset[str]:
    """The key fingerprints in a presence message. Raises InvalidMessage."""
    return _texts(_members(data), KEYS, MAX_KEYS, MAX_KEY)


def wrong_in(data: bytes) -> frozenset[str]:
    """The kinds of faults in a presence message. Raises InvalidMessage."""
    kinds = _texts(_members(data), WRONG, MAX_REASONS, 32)
    if not all(map(_KIND.fullmatch, kinds)):
        raise InvalidMessage(f"presence: member {WRONG!r} must have words alone")
    return kinds


def _members(data: bytes) -> Members:
    if len(data) > MAX_BYTES:
        raise InvalidMessage("the presence message is too long")
    return PRESENCE.parse(data, "presence")


def _slots(members: Members, name: str) -> int:
    count = members.count(name)
    if count > MAX_SLOTS:
        raise InvalidMessage(f"presence: member {name!r} must be {MAX_SLOTS} at most")
    return count


def _room(members: Members, models: frozenset[str]) -> dict[str, int]:
    """Free slots, for announced models only."""
    said = members.counts(ROOM)
    return {model: min(said[model], MAX_SLOTS) for model in models & said.keys()}


def _texts(members: Members, name: str, number: int, length: int) -> frozenset[str]:
    texts = members.texts(name)
    if len(texts) > number or any(len(text) > length for text in texts):
        raise InvalidMessage(f"presence: member {name!r} must have {number} entries of {length} characters at most")
    return frozenset(texts)


def _shown(members: Members, name: str, number: int, length: int) -> frozenset[str]:
    """As `_texts`, for what people are shown and no request depends on. Empty if it is missing or wrong."""
    try:
        return _texts(members, name, number, length)
    except InvalidMessage:
        return frozenset()


class Roster:
    """The workers of one pool whose presence arrived in the last `PRESENT_FOR` seconds. clock: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By region and node, the most recent last. The time is when the presence expires.
        self._nodes: dict[tuple[str, str], tuple[float, Presence]] = {}
        self._regions: Counter[str] = Counter()  # workers in each region
        self._sums = ModelSums()
        self._free: dict[str, Mapping[str, int]] = {}  # by model; empty again when a worker says something else about its slots

    def hear(self, region: str, node: str, presence: Presence) -> bool:
        """Records a worker's presence. False if the pool has too many workers or regions; the known ones stay."""
        self._forget()
        known = self._nodes.pop((region, node), None)
        if known is None:
            if len(self._nodes) >= MAX_NODES or (region not in self._regions and len(self._regions) >= MAX_REGIONS):
                return False
            self._regions[region] += 1
        if known is None or known[1].slots != presence.slots:
            self._free.clear()
        self._nodes[region, node] = self._clock() + PRESENT_FOR, presence
        self._sums.hear(region, node, presence.counts)
        return True

    def silenced(self, region: str, node: str) -> None:
        """The worker does not answer: it counts again with its next presence."""
        if (known := self._nodes.get((region, node))) is not None:
            self._nodes[region, node] = known[0], replace(known[1], offers=False)

    def live(self) -> Mapping[tuple[str, str], Presence]:
        """By region and node."""
        self._forget()
        return {at: presence for at, (_, presence) in self._nodes.items()}

    def capacity(self) -> dict[str, Capacity]:
        """By region. A draining worker serves no model and does not count."""
        found: dict[str, Capacity] = {}
        for (region, _), said in self.live().items():
            if said.models:
                at = found.get(region, Capacity())
                found[region] = Capacity(at.workers + 1, at.busy + said.busy, at.free + said.free)
        return found

    def counts(self) -> dict[tuple[str, str], ModelCounts]:
        """The workers' counts by region and model. Only `running` is of the live ones."""
        self._forget()
        return self._sums.total()

    def free(self, model: str) -> Mapping[str, int]:
        """Free slots of the workers that serve the model, by region. Regions without such a worker are omitted."""
        self._forget()
        if (kept := self._free.get(model)) is not None:
            return kept
        found: dict[str, int] = {}
        for (region, _), (_, said) in self._nodes.items():
            if model in said.models:
                found[region] = found.get(region, 0) + said.free_for(model)
        if found:  # only names that workers announce are kept
            self._free[model] = found
        return found

    def offered(self, model: str, region: str) -> dict[str, int]:
        """The workers of the region that serve the model and take offered work, each with its free slots for it."""
        said = {node: said for (at, node), said in self.live().items() if at == region}
        return {node: one.free_for(model) for node, one in said.items() if one.offers and model in one.models}

    def _forget(self) -> None:
        now = self._clock()
        while self._nodes and self._nodes[oldest := next(iter(self._nodes))][0] <= now:
            del self._nodes[oldest]
            self._free.clear()
            self._sums.forget(*oldest)
            self._regions[oldest[0]] -= 1
            if not self._regions[oldest[0]]:
                del self._regions[oldest[0]]
