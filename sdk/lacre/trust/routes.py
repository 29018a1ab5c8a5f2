"""Which pools serve a model, as the publisher signs it in the manifest: shares of the traffic, and pools that stand by.

Rules:
- A draw depends only on its seed, so that one seed falls on one pool for as long as the route stays the same.
- A pool whose share grows takes traffic from the others, and loses none (weighted rendezvous hashing).
- A route names pools and their models, and never another route: nothing here can go round in circles.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.wire import outer

MAX_ROUTES: Final = 256  # names for applications; more would be a catalogue, and every client reads all of them
MAX_TARGETS: Final = 8  # of one route: each may cost a call one more attempt
MAX_SHARE: Final = 10**6  # fine enough for a canary of one request in a million
SEED: Final = hashlib.sha256().digest_size  # bytes
_BITS: Final = 53  # of a draw: what a float holds exactly


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """A pool and one of its models. share: of the traffic, in proportion to the other shares; 0: the pool only stands by."""

    pool: str
    model: str
    share: int = 0

    def members(self) -> dict[str, Any]:
        return {"pool": self.pool, "model": self.model, "share": self.share}


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """targets: in the order in which they stand in for each other. If all shares are 0, the first one gets all traffic.

    sticky: whether one user stays with one pool; else each call draws for itself.
    """

    targets: tuple[RouteTarget, ...]
    sticky: bool = True

    def members(self) -> dict[str, Any]:
        return {"pools": [target.members() for target in self.targets], "sticky": self.sticky}

    @classmethod
    def parse(cls, name: str, members: Members) -> ModelRoute:
        """name: the route's own, which a target without `model` has too. Raises InvalidMessage."""
        targets = tuple(_target(name, each) for each in members.objects("pools"))
        if not outer.is_name(name):
            raise InvalidMessage("a route's name must have 1 to 128 visible ASCII characters")
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise InvalidMessage(f"a route must have 1 to {MAX_TARGETS} pools")
        if len({(target.pool, target.model) for target in targets}) < len(targets):
            raise InvalidMessage("a route must name each pool's model once")
        return cls(targets, members.flag("sticky") if "sticky" in members else True)

    def portion(self, target: RouteTarget) -> float:
        """Of the traffic, from 0 to 1, while every pool has a worker."""
        total = sum(each.share for each in self.targets)
        return target.share / total if total else float(target is self.targets[0])

    def ordered(self, seed: bytes) -> tuple[RouteTarget, ...]:
        """The target that the draw falls on, and then the others in their order. seed: `SEED` bytes that look random."""
        drawn = min(self.targets, key=lambda target: _waits(seed, target))  # the first, if no one has a share
        return (drawn, *(target for target in self.targets if target is not drawn))


def routes_of(routes: Mapping[str, Members]) -> dict[str, ModelRoute]:
    """Raises InvalidMessage."""
    if len(routes) > MAX_ROUTES:
        raise InvalidMessage(f"there must be at most {MAX_ROUTES} routes")
    return {name: ModelRoute.parse(name, each) for name, each in routes.items()}


def sticky_seed(key: bytes, route: str, scope: str | None) -> bytes:
    """The seed of one user of a program. Without the key, a draw tells nothing of the user, and each route draws apart.

    key: `SEED` random bytes of the program. scope: names the user; None: the program itself.
    """
    user = b"" if scope is None else b"\0" + scope.encode()  # a route's name has no NUL
    return hmac.digest(key, b"lacre route 1\0" + route.encode() + user, "sha256")


def _waits(seed: bytes, target: RouteTarget) -> float:
    """The draw falls on the target that waits least: times with an exponential distribution, whose rates are the shares."""
    if not target.share:
        return math.inf
    named = hmac.digest(seed, f"{target.pool}\0{target.model}".encode(), "sha256")
    drawn = (int.from_bytes(named[:8]) >> (64 - _BITS)) + 0.5
    return -math.log(drawn / 2**_BITS) / target.share


def _target(route: str, members: Members) -> RouteTarget:
    model = members.text("model") if "model" in members else route
    target = RouteTarget(members.text("pool"), model, members.count("share") if "share" in members else 0)
    if not (outer.is_name(target.pool) and outer.is_name(target.model)):
        raise InvalidMessage("the names of a pool and its model must have 1 to 128 visible ASCII characters")
    if target.share > MAX_SHARE:
        raise InvalidMessage(f"a share must be at most {MAX_SHARE}")
    return target
