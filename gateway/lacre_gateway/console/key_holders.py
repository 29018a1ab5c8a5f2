"""Which live workers have which keys, and which rotations are not over: by their presence and the manifest.

Rules:
- It decides from values, and does no I/O. What is older than `PRESENT_FOR` is not in them.
- A worker chooses the bytes of its presence. It is believed about itself, and only text of a fingerprint's form is shown.
- `lacre keys list` on the publisher's machine asks workers again, and knows the private keys. This is a view of the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lacre.trust.manifest import Manifest, Pool, fingerprint
from lacre.wire.header import Kem
from lacre_fabric.nats.subjects import DEFAULT_REGION
from lacre_fabric.work.contract import SeenWorker
from lacre_fabric.work.presence import accepts_grants_of
from lacre_gateway.console.reports import RotationReport, UnlistedKeyReport
from lacre_gateway.console.words import when

_FINGERPRINT: Final = re.compile(r"[A-Za-z0-9_-]{16}")
_MOST_UNLISTED: Final = 64  # keys of one pool: a worker may announce a thousand
_NAMED: Final = 5  # workers in one sentence


class LivePools:
    """The live workers of each pool, by the names that people read. seen: by pool, region and node."""

    def __init__(self, seen: Mapping[tuple[str, str, str], SeenWorker]) -> None:
        self._pools: dict[str, dict[str, frozenset[str]]] = {}
        for (pool, region, node), said in sorted(seen.items()):
            name = node if region == DEFAULT_REGION else f"{region}/{node}"
            self._pools.setdefault(pool, {})[name] = said.keys

    def of(self, pool: str) -> Mapping[str, frozenset[str]]:
        return self._pools.get(pool, {})

    def holders(self, pool: str | None, key: str) -> tuple[list[str], list[str]]:
        """The workers that announce this, and those that do not. pool: None: of all."""
        pools = self._pools if pool is None else {pool: self.of(pool)}
        every = [
            (f"{name} of {of}" if pool is None else name, keys)
            for of, workers in pools.items()
            for name, keys in workers.items()
        ]
        return [name for name, keys in every if key in keys], [name for name, keys in every if key not in keys]


def unlisted(manifest: Manifest, live: LivePools) -> Iterator[UnlistedKeyReport]:
    """Keys that live workers have beside those of the manifest: old ones that were not destroyed yet, or staged ones."""
    for name, pool in sorted(manifest.pools.items()):
        listed = {fingerprint(key.config) for key in pool.keys}
        announced = {key for keys in live.of(name).values() for key in keys if _FINGERPRINT.fullmatch(key)}
        for key in sorted(announced - listed)[:_MOST_UNLISTED]:
            yield UnlistedKeyReport(pool=name, key=key, workers=live.holders(name, key)[0])


def rotations(manifest: Manifest, live: LivePools, signs: bytes, now: float) -> Iterator[RotationReport]:
    """signs: the public key with which this gateway signs its grants."""
    for name, pool in sorted(manifest.pools.items()):
        yield from _of_pool(name, pool, live, now)
    key, *others = manifest.gateway_keys
    _, lack = live.holders(None, accepts_grants_of(key))
    if others:
        yield RotationReport(what="grants", of="gateways", waits="the manifest still accepts the older key of the gateways")
    if signs != key:
        yield RotationReport(what="grants", of="gateways", waits="this gateway does not sign with the newest key yet")
    if lack:
        yield RotationReport(what="grants", of="gateways", waits=f"{_names(lack)}: no word yet that the key is accepted")


def _of_pool(name: str, pool: Pool, live: LivePools, now: float) -> Iterator[RotationReport]:
    suites: dict[str, list[float]] = {}
    for key in pool.keys:  # the newest first
        if key.not_after <= now:
            continue
        ends = suites.setdefault(Kem(key.config.kem).label, [])
        ends.append(key.not_after)
        _, lack = live.holders(name, fingerprint(key.config))
        if len(ends) == 1 and lack:
            yield RotationReport(what="pool", of=name, waits=f"{_names(lack)}: without key {key.config.key_id}, the newest")
    for suite, ends in suites.items():
        if len(ends) > 1:
            yield RotationReport(what="pool", of=name, waits=f"an older key of {suite} ends at {when(ends[1])} UTC")
    for past in pool.past_receipts:
        if past.until > now:
            yield RotationReport(what="receipts", of=name, waits=f"a past receipt key counts until {when(past.until)} UTC")


def _names(workers: Sequence[str]) -> str:
    more = len(workers) - _NAMED
    return ", ".join(workers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
