"""The pseudonyms by which workers share their time fairly between tenants, and between the callers of one.

Rules
- A worker must be able to tell two callers apart, and must not learn who they are. So it gets an HMAC under a key that only
  gateways have.
- All gateways of a site must agree, or a caller would gain a share with each of them. The key is derived (HKDF, RFC 5869) from
  the signing key that they have in common, so there is no further secret to hand out or to rotate.
- The pseudonyms change with every hour of the clock. Across hours nobody but the gateway can link them.
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

HOUR: Final = 3600  # seconds: as long as clients keep one cache salt, so that a worker learns little that it could not see
_INFO: Final = b"lacre fairness pseudonyms"


class Pseudonyms:
    """key: the gateway's signing key, which all gateways of the site share."""

    __slots__ = ("_key",)

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = HKDF(hashes.SHA256(), 32, salt=None, info=_INFO).derive(key.private_bytes_raw())

    def of(self, who: Principal, now: float) -> tuple[str, str]:
        """Of the tenant and of the caller, as a grant carries them. now: seconds since the epoch."""
        hour = str(int(now // HOUR))
        return self._of("tenant", hour, who.tenant), self._of("caller", hour, who.tenant, who.issuer, who.subject)

    def _of(self, *parts: str) -> str:
        """Each part is preceded by its length: no two lists of parts make the same bytes."""
        encoded = [part.encode(errors="surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
        return b64u(hmac.digest(self._key, message, hashlib.sha256)[:PSEUDONYM])
