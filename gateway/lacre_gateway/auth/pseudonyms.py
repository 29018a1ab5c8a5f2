"""Pseudonyms by which workers share their time fairly between tenants, and between the callers of one tenant.

Rules:
- A worker must tell callers apart without learning who they are. So it gets an HMAC under a key that only gateways have.
- All gateways of a site must agree, or a caller would gain a share with each of them. The key is derived (HKDF, RFC 5869) from
  their common signing key, so there is no further secret to distribute or rotate.
- The pseudonyms change with every hour of the clock. Only the gateway can link them across hours.
- Those of this hour are kept for some thousand callers, because each request of a caller asks for the same ones.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lacre.jose.jws import b64u
from lacre_fabric.work.grants import PSEUDONYM
from lacre_gateway.auth.claims import Principal

HOUR: Final = 3600  # seconds: as long as clients keep one cache salt, so a worker learns little that it could not see anyway
_INFO: Final = b"lacre fairness pseudonyms"
KEPT: Final = 4096  # callers whose pseudonyms are kept, of some hundred bytes each; a busy gateway serves fewer in an hour


class Pseudonyms:
    """key: the gateways' common signing key of this site."""

    __slots__ = ("_hour", "_kept", "_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = HKDF(hashes.SHA256(), 32, salt=None, info=_INFO).derive(key.private_bytes_raw())
        self._hour = 0
        self._kept: dict[tuple[str, str, str], tuple[str, str]] = {}  # of this hour

    def __len__(self) -> int:
        """Of how many callers it keeps them."""
        return len(self._kept)

    def of(self, who: Principal, now: float) -> tuple[str, str]:
        """The pseudonyms of the tenant and of the caller for a grant. now: seconds since the epoch."""
        hour, caller = int(now // HOUR), (who.tenant, who.issuer, who.subject)
        if hour != self._hour or len(self._kept) >= KEPT:
            self._hour, self._kept = hour, {}
        found = self._kept.get(caller)
        if found is None:
            tenants = self._of("tenant", str(hour), who.tenant)
            found = self._kept[caller] = tenants, self._of("caller", str(hour), *caller)
        return found

    def _of(self, *parts: str) -> str:
        """Each part is preceded by its length, so that no two lists of parts make the same bytes."""
        encoded = [part.encode(errors="surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
        return b64u(hmac.digest(self._key, message, hashlib.sha256)[:PSEUDONYM])
