"""Is a manifest older than one seen before? Decides from a verified manifest and the remembered ones; fetches and stores
nothing.

Rules:
- A *lineage* is a root with the roots that it handed over to. Memory belongs to the lineage, not to the pin: an application
  that pins a later root keeps it.
- A manifest's `ver` only rises, and two manifests of one version are the same bytes.
- Root statements are only added. A chain without the newest statement seen is older (or a fork), even if its manifest claims a
  higher version. Otherwise the thief of a replaced key could go on signing.
- A client ignores an older manifest while the remembered one still verifies, because a gateway may be late in a rolling update.
  Once the remembered one no longer verifies, the client refuses the older one. It never believes a remembered manifest without
  verifying it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre.errors import Expired, Rollback, UntrustedRoot
from lacre.trust.chain import Ancestry, Trusted, chain_of, follow, verify
from lacre.trust.manifest import Document

MAX_TRIED: Final = 128  # remembered roots to try as the signer of one change of root: 0.1 ms each


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest manifest seen of a lineage.

    pin: the root that it was verified from. roots: every root known to be of the lineage.
    """

    pin: bytes
    roots: tuple[bytes, ...]
    version: int
    document: bytes


def newest(candidate: Trusted, remembered: Sequence[Seen], now: float) -> Trusted:
    """The manifest to use: the candidate, or one seen before. now: seconds since the epoch. Raises Rollback."""
    lineage = sorted(_related(candidate, remembered), key=lambda seen: -seen.version)
    for seen in lineage:
        same = candidate.manifest.version == seen.version
        if same and candidate.token != Document.parse(seen.document).manifest:
            raise Rollback("two different manifests have the same version: do not trust the signer or the gateway")
        if candidate.manifest.version < seen.version or not _continues(candidate, seen):
            return _again(seen, candidate.roots[0], now)
    return candidate


def remember(chosen: Trusted, remembered: Sequence[Seen]) -> tuple[Seen, ...]:
    """What to remember once `chosen` is used. Lineages that turn out to be the same are merged."""
    lineage = _related(chosen, remembered)
    roots = {*chosen.roots, *(root for seen in lineage for root in seen.roots)}
    pin = next((seen.pin for seen in lineage if seen.document == chosen.document), chosen.roots[0])
    kept = Seen(pin, tuple(sorted(roots)), chosen.manifest.version, chosen.document)
    return tuple(sorted((kept, *(seen for seen in remembered if seen not in lineage)), key=lambda seen: seen.roots))


def _related(candidate: Trusted, remembered: Sequence[Seen]) -> list[Seen]:
    """The remembered manifests of the candidate's lineage: they share a root with it, or their root led to the pinned one in
    the candidate's chain.

    A chain is searched once, however many lineages are remembered, and only if it says that the pinned root took over from
    another.
    """
    roots, pin = frozenset(candidate.roots), candidate.roots[0]
    if all(step.statement.next_root != pin for step in candidate.steps):
        return [seen for seen in remembered if not roots.isdisjoint(seen.roots)]
    ancestry = Ancestry.of(chain_of(Document.parse(candidate.document), pin), pin)
    others = dict.fromkeys(root for seen in remembered for root in seen.roots if root not in roots)
    led = {root for root in itertools.islice(others, MAX_TRIED) if ancestry.signed_by(root)} | roots | ancestry.roots
    return [seen for seen in remembered if not led.isdisjoint(seen.roots)]


def _continues(candidate: Trusted, seen: Seen) -> bool:
    """Whether the candidate's chain holds the last statement seen, or begins after it."""
    last = follow(chain_of(Document.parse(seen.document), seen.pin), seen.pin)[-1]
    if last.root in candidate.roots:
        return last in candidate.steps
    return candidate.roots[0] not in seen.roots


def _again(seen: Seen, pin: bytes, now: float) -> Trusted:
    try:
        return verify(seen.document, pin, now)
    except (Expired, UntrustedRoot) as exc:
        raise Rollback(
            "the gateway serves an older manifest than one already seen, and the newer one is no longer valid"
        ) from exc
