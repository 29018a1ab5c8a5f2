"""The generations of a pool's keys: which ones the manifest lists, which are due for destruction, which key ids are free.

Decides from saved state and a clock value. No I/O and no private keys. A generation's life:

    staged     created and given to the workers; no client seals to it yet
    listed     in the manifest, since every live worker has it; the newest is first
    retiring   a newer one is listed; this one stays listed until `retire_at`, for clients that do not know the newer one
    unlisted   no manifest has it any longer; for `drain` seconds, requests sealed to it may still be queued
    destroyed

Rules:
- Each step is saved before the next begins, and each may be repeated: a later run completes an interrupted one.
- A key id is one byte (RFC 9458 section 3). An id that was in a manifest is reused only when every such manifest has expired.
  Otherwise a client with an old manifest would seal to the wrong key, and could not be told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from lacre.errors import LacreError, SettingsError
from lacre.jose.jws import b64u, b64u_decode
from lacre.trust.chain import MAX_FUTURE
from lacre.trust.manifest import PoolKey
from lacre.wire.header import KeyConfig

KEY_IDS: Final = range(1, 256)
MAX_DRAIN: Final = 35.0  # seconds: a message's life in the queue, plus the gateway's time to read a new manifest


@dataclass(frozen=True, slots=True)
class Generation:
    """One key for each KEM of the pool, the preferred one first. Times are in seconds since the epoch."""

    configs: tuple[KeyConfig, ...]
    listed_at: float | None = None
    retire_at: float | None = None
    unlisted_at: float | None = None
    drain: float = MAX_DRAIN

    def listed(self, now: float) -> bool:
        return self.listed_at is not None and (self.retire_at is None or now < self.retire_at)

    def leaves(self, now: float) -> bool:
        """Whether the next manifest is the first without it."""
        return self.listed_at is not None and self.unlisted_at is None and not self.listed(now)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(config.key_id for config in self.configs)


@dataclass(frozen=True, slots=True)
class Generations:
    """All generations of a pool's keys. live: those not destroyed, newest first. spent: key ids of the destroyed ones, each
    with the time when it is free again.
    """

    live: tuple[Generation, ...] = ()
    spent: Mapping[int, float] = field(default_factory=dict)
    last_id: int = 0

    @property
    def staged(self) -> Generation | None:
        return next((one for one in self.live if one.listed_at is None), None)

    @property
    def current(self) -> Generation | None:
        """The newest listed generation: clients seal to it."""
        return next((one for one in self.live if one.listed_at is not None), None)

    def pool_keys(self, now: float, until: float) -> tuple[PoolKey, ...]:
        """The keys that a manifest lists. until: expiry of a key that is not retiring."""
        return tuple(
            PoolKey(config, until if one.retire_at is None else one.retire_at)
            for one in self.live
            if one.listed(now)
            for config in one.configs
        )

    def free_ids(self, count: int, now: float) -> tuple[int, ...]:
        """The next `count` ids after the last used one. Raises SettingsError if too few are free within a manifest's life."""
        taken = {key_id for one in self.live for key_id in one.ids}
        taken |= {key_id for key_id, free_at in self.spent.items() if now < free_at}
        after = [key_id for key_id in KEY_IDS if key_id > self.last_id]
        free = [key_id for key_id in (*after, *KEY_IDS) if key_id not in taken]
        if len(free) < count:
            raise SettingsError("every key id was in a manifest that may still be valid: wait a day before the next rotation")
        return tuple(free[:count])

    def stage(self, configs: Sequence[KeyConfig]) -> Self:
        return replace(self, live=(Generation(tuple(configs)), *self.live), last_id=configs[-1].key_id)

    def list_staged(self, now: float, grace: float) -> Self:
        """The staged generation becomes current. The others retire in `grace` seconds, or earlier if so planned."""
        return replace(self, live=tuple(_after_rotation(one, now, grace) for one in self.live))

    def published(self, now: float) -> Self:
        """A manifest as of `now` is on the fabric: generations that it no longer lists begin to drain."""
        live = tuple(replace(one, unlisted_at=now) if one.leaves(now) else one for one in self.live)
        return replace(self, live=live)

    def leaving(self, now: float) -> bool:
        """Whether a manifest still lists a generation whose time is over."""
        return any(one.leaves(now) for one in self.live)

    def retirement_due(self, now: float) -> bool:
        return self.leaving(now) or bool(self.to_destroy(now))

    def to_destroy(self, now: float) -> tuple[Generation, ...]:
        return tuple(one for one in self.live if one.unlisted_at is not None and now >= one.unlisted_at + one.drain)

    def destroyed(self, gone: Generation, now: float, manifest_lifetime: float) -> Self:
        """manifest_lifetime: of the last manifest that listed it, in seconds. The id stays reserved a little longer, for slow
        clocks.
        """
        free_at = now + manifest_lifetime + MAX_FUTURE
        spent = {key_id: until for key_id, until in self.spent.items() if now < until} | dict.fromkeys(gone.ids, free_at)
        return replace(self, live=tuple(one for one in self.live if one != gone), spent=spent)

    def encode(self) -> bytes:
        members = {
            "live": [_members(one) for one in self.live],
            "spent": {str(key_id): until for key_id, until in self.spent.items()},
            "last_id": self.last_id,
        }
        return json.dumps(members, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Self:
        """Raises ValueError for data that `encode` did not write."""
        try:
            members = json.loads(data)
            live = tuple(map(_parse, members["live"]))
            spent = {int(key_id): float(until) for key_id, until in members["spent"].items()}
            return cls(live, spent, int(members["last_id"]))
        except (ValueError, KeyError, TypeError, AttributeError, LacreError) as exc:
            raise ValueError("not the generations of a pool's keys") from exc


def _after_rotation(generation: Generation, now: float, grace: float) -> Generation:
    if generation.listed_at is None:
        return replace(generation, listed_at=now)
    retire_at = now + grace
    if generation.retire_at is not None and generation.retire_at <= retire_at:
        return generation
    # An operator who wants a key gone at once does not want to wait for the queue.
    return replace(generation, retire_at=retire_at, drain=min(grace, MAX_DRAIN))


def _members(generation: Generation) -> dict[str, Any]:
    return {
        "configs": [b64u(config.encode()) for config in generation.configs],
        "listed_at": generation.listed_at,
        "retire_at": generation.retire_at,
        "unlisted_at": generation.unlisted_at,
        "drain": generation.drain,
    }


def _parse(members: Mapping[str, Any]) -> Generation:
    configs = tuple(KeyConfig.parse(b64u_decode(config)) for config in members["configs"])
    listed_at, retire_at, unlisted_at = (_time(members, name) for name in ("listed_at", "retire_at", "unlisted_at"))
    return Generation(configs, listed_at, retire_at, unlisted_at, float(members["drain"]))


def _time(members: Mapping[str, Any], name: str) -> float | None:
    return None if members[name] is None else float(members[name])
