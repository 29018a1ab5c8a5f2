"""What befalls a deployment, and when: all of it drawn from one seed, before anything runs.

Rules:
- No I/O and no clock: the same seed and length give the same strikes.
- Strikes come in rounds, those of message servers in rounds apart. Each has every kind once, in an order of its own: what
  a run is long enough for, it has.
- At most one message server is away at a time, and it has `REJOIN` seconds to catch up before another goes: of three, two that
  are there answer. Everything else overlaps as it comes.
- What is `SPARED` is stopped, starved and cut off, and never killed: in it a leak has the whole run to show.
- The first `WARM_UP` seconds and the last `CALM` are without strikes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal[
    "kill-gateway", "kill-worker", "kill-server", "stop-gateway", "stop-worker", "stop-server",
    "leader", "partition", "skew", "disk", "keys", "policies",
]  # fmt: skip

GATEWAYS: Final = ("g1", "g2", "g3")
REAL_WORKERS: Final = ("n1", "n2")
ECHO_WORKERS: Final = ("n3", "n4")
WORKERS: Final = REAL_WORKERS + ECHO_WORKERS
SERVERS: Final = ("s1", "s2", "s3")
SPARED: Final = frozenset({"g3", "n2", "n4"})
SMALL_DISK: Final = "g3"  # the gateway whose audit log is on a disk that is filled

WARM_UP: Final = 10.0
CALM: Final = 15.0
REJOIN: Final = 8.0
GAP: Final = (1.0, 4.0)  # seconds from one strike to the next
SKEWS: Final = (-30.0, -5.0, 5.0, 30.0)  # seconds; a grant is good for a worker whose clock is less than a minute off

# Targets, and how long each lasts at least and at most, in seconds. A leader is known only when it is struck.
_STRIKES: Final[dict[Kind, tuple[tuple[str, ...], float, float]]] = {
    "kill-gateway": (tuple(name for name in GATEWAYS if name not in SPARED), 0.5, 3.0),
    "kill-worker": (tuple(name for name in WORKERS if name not in SPARED), 0.5, 3.0),
    "kill-server": (SERVERS, 0.5, 3.0),
    "stop-gateway": (GATEWAYS, 1.0, 5.0),
    "stop-worker": (WORKERS, 1.0, 5.0),
    "stop-server": (SERVERS, 1.0, 5.0),
    "leader": (("leader",), 0.5, 3.0),
    "partition": (SERVERS, 3.0, 8.0),
    "skew": (ECHO_WORKERS, 5.0, 15.0),
    "disk": ((SMALL_DISK,), 3.0, 8.0),
    "keys": (("default",), 0.0, 0.0),
    "policies": (("plans.toml",), 0.0, 0.0),
}
OF_SERVERS: Final[frozenset[Kind]] = frozenset({"kill-server", "stop-server", "leader", "partition"})


@dataclass(frozen=True, slots=True)
class Strike:
    """at: seconds after the load began. lasting: seconds until it is undone. skew: of a clock, in seconds."""

    at: float
    kind: Kind
    target: str
    lasting: float
    skew: float = 0.0


def draw(seed: int, seconds: float) -> list[Strike]:
    """In the order of their times."""
    servers = _drawn(random.Random(f"{seed} servers"), [kind for kind in _STRIKES if kind in OF_SERVERS], seconds)
    others = _drawn(random.Random(f"{seed} others"), [kind for kind in _STRIKES if kind not in OF_SERVERS], seconds)
    return sorted([*servers, *others], key=lambda strike: strike.at)


def _drawn(chance: random.Random, kinds: Sequence[Kind], seconds: float) -> Iterator[Strike]:
    at = WARM_UP
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            targets, least, most = _STRIKES[kind]
            target, lasting, skew = chance.choice(targets), chance.uniform(least, most), chance.choice(SKEWS)
            if at + lasting > seconds - CALM:
                return
            yield Strike(round(at, 2), kind, target, round(lasting, 2), skew if kind == "skew" else 0.0)
            at += lasting + REJOIN if kind in OF_SERVERS else chance.uniform(*GAP)
