"""Is a kept receipt one of the deployment's? A manifest decides: it names the keys that sign receipts, and those that did.

Rules:
- No I/O and no clock.
- A key that was replaced counts for receipts from before its end alone. A thief of such a key could sign new ones.
- It shows that the pool signed these counts. It proves neither the counts nor who asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lacre.errors import InvalidReceipt, InvalidSignature, SettingsError
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre.trust.manifest import Manifest, Pool


@dataclass(frozen=True, slots=True)
class KeptReceipt:
    """A receipt, the pool that signed it, and with which key. until: when that key was replaced; None: it is in use."""

    receipt: Receipt
    pool: str
    key: bytes
    until: float | None


def check(text: str, manifest: Manifest, pool: str | None = None) -> KeptReceipt:
    """Finds who signed a kept receipt. text: as `Receipt.text` gives it. pool: only this one; None: any pool of the manifest.

    Raises InvalidMessage for a text that is no receipt, InvalidReceipt for one that no key of the manifest signed in its time,
    and SettingsError for an unknown pool.
    """
    if pool is not None and pool not in manifest.pools:
        raise SettingsError(f"unknown pool {pool!r}: the manifest has {', '.join(manifest.pools)}")
    names = manifest.pools if pool is None else [pool]
    found = [kept for name in names for kept in _signers(text, name, manifest.pools[name])]
    if not found:
        where = "any pool" if pool is None else f"the pool {pool}"
        raise InvalidReceipt(
            f"no key of {where} in the manifest signed this receipt: it is another deployment's, it was changed, "
            "or its key was replaced too long ago"
        )
    late = found[0]
    for kept in found:
        if kept.until is None or kept.receipt.end <= kept.until:
            return kept
    raise InvalidReceipt(
        f"a replaced key of the pool {late.pool} signed the receipt. It signed nothing after {late.until:.0f}, and the receipt "
        f"says {late.receipt.end:.0f}: a thief of the key may have made it"
    )


def _signers(text: str, name: str, pool: Pool) -> Iterator[KeptReceipt]:
    """The pool's keys that signed it, those in use first."""
    used = {key.receipt_key or pool.receipt_key for key in pool.keys} | {pool.receipt_key}
    known = [*((key, None) for key in sorted(used, key=b64u)), *((one.key, one.until) for one in pool.past_receipts)]
    for key, until in known:
        try:
            yield KeptReceipt(Receipt.verify(text, key), name, key, until)
        except InvalidSignature:
            continue
