"""Where a call goes: the pool that the caller chose, the one that an answer began in, or the ones that a signed route names.

Rules:
- Only a route of the verified manifest leads to another pool. Nobody signs a refusal, so it chooses only among those.
- The next pool is asked only if the request certainly is in no queue, because its pool has no worker or no queue. After
  `UNAVAILABLE` it may be in one, so the pool stays the same.
- A pool that the client cannot seal to is passed over, as long as another one of the route is left.
- A denial is an answer: no other pool is asked in its place.
- A call asks the pools once each without a pause, and then goes on among them at the pace of its retries.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lacre.errors import SettingsError, UsageError, WrongModel
from lacre.exchange.request import AskedModel, Plain, asked_model
from lacre.problems import NO_WORKER, Problem
from lacre.trust.manifest import Manifest, Pool
from lacre.trust.routes import SEED, ModelRoute, sticky_seed

DEFAULT_POOL: Final = "default"  # of a caller who chose none, for a model without a route
_PASSED: Final = (NO_WORKER,)  # also said of a pool whose queue is gone


class Destination(NamedTuple):
    """model: in place of the name that the caller gave; None: that name."""

    pool: str
    model: str | None


@dataclass(slots=True)
class CallRoute:
    """The way of one call. pool: the caller's choice, if any. drawn: the seed of a route that is not sticky. passed: how many
    pools could not take it. ways: so many pools had the route of the newest attempt. asked: what the caller asks for; None
    before a manifest with routes, where it makes no difference.
    """

    plain: Plain
    pool: str | None
    drawn: bytes = field(default_factory=lambda: secrets.token_bytes(SEED), repr=False)
    passed: int = 0
    ways: int = 1
    asked: AskedModel | None = None

    @property
    def model(self) -> str | None:
        """The name that the caller asks for, if that matters."""
        return None if self.asked is None else self.asked.model

    @classmethod
    def of(cls, plain: Plain, pool: str | None) -> CallRoute:
        return cls(plain, plain.overrides.pool or pool)

    def lacks_its_pool(self, manifest: Manifest) -> bool:
        """Whether the caller chose a pool that this manifest does not have."""
        return self.pool is not None and self.pool not in manifest.pools

    def found(self, manifest: Manifest, key: bytes, sealable: Callable[[Pool], bool]) -> tuple[Destination, Pool]:
        """Where the next attempt goes. key: see `sticky_seed`. sealable: whether the client can seal to a pool. Raises
        UsageError or SettingsError.
        """
        if manifest.routes and self.asked is None:  # reading a large body takes a while
            mine = manifest.pools.get(self.pool or DEFAULT_POOL)
            self.asked = asked_model(self.plain, {} if mine is None else mine.models)
        ways = self._ways(manifest, key, sealable)
        self.ways = len(ways)
        way = ways[self.passed % len(ways)]
        pool = manifest.pools.get(way.pool)
        if pool is None:
            raise UsageError(f"the manifest has no pool {way.pool!r}: it has {', '.join(sorted(manifest.pools)) or 'none'}")
        return way, pool

    def moves_on(self, problem: Problem) -> bool:
        """Whether another pool may be asked at once, after this refusal."""
        if problem not in _PASSED:
            return False
        self.passed += 1
        return self.passed < self.ways

    def _ways(self, manifest: Manifest, key: bytes, sealable: Callable[[Pool], bool]) -> tuple[Destination, ...]:
        if self.plain.stays is not None:
            return (Destination(*self.plain.stays),)
        asked = self.model
        route = None if asked is None else manifest.routes.get(asked)
        if asked is None or self.asked is None or route is None:
            return (Destination(self.pool or DEFAULT_POOL, None),)
        if self.pool is not None:
            return (Destination(self.pool, _in_pool(manifest, route, asked, self.pool)),)
        seed = sticky_seed(key, asked, self.asked.user) if route.sticky else self.drawn
        there = [target for target in route.ordered(seed) if target.pool in manifest.pools]
        if not there:
            raise SettingsError(f"no pool of the route {asked!r} is in the manifest: tell the operator, or name a pool")
        usable = [target for target in there if sealable(manifest.pools[target.pool])]
        return tuple(Destination(target.pool, target.model) for target in usable or there)


def _in_pool(manifest: Manifest, route: ModelRoute, asked: str, pool: str) -> str | None:
    """What the name means in the caller's own pool: the pool's model of that name, or else the one that the route has there."""
    if pool in manifest.pools and asked in manifest.pools[pool].models:
        return None
    return next((target.model for target in route.targets if target.pool == pool), None)


def models_of(manifest: Manifest, pool: str | None) -> tuple[str, ...]:
    """What a caller may ask for, the default first. pool: the caller's choice, if any. Raises SettingsError."""
    name = pool or DEFAULT_POOL
    routes = [route for route, each in manifest.routes.items() if pool is None or pool in {to.pool for to in each.targets}]
    if name not in manifest.pools and (pool is not None or not routes):
        raise SettingsError(f"the manifest has no pool {name!r}: it has {', '.join(sorted(manifest.pools)) or 'none'}")
    models = manifest.pools[name].models if name in manifest.pools else ()
    return tuple(dict.fromkeys([*models, *routes]))


def pin_of(pins: Mapping[str, str], asked: str | None, model: str) -> str | None:
    """The digest that the caller pinned, for the name that it asked for or for the pool's. Raises WrongModel if they differ."""
    pinned = {pins[name] for name in (asked, model) if name is not None and name in pins}
    if len(pinned) > 1:
        raise WrongModel(
            f"pin_models has one file for {asked!r} and another for {model!r}, to which the route leads; nothing was sent"
        )
    return next(iter(pinned), None)
