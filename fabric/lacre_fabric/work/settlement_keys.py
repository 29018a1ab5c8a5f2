"""The keys under which workers send a MAC with each receipt, so that a gateway need not verify each signature.

Rules:
- A gateway's process makes the key, and seals it to the pool key that the request itself is sealed to. So the workers who can
  read the request learn it, and nobody else does. It is in memory only, on both sides, and is overwritten after its last use.
- This side seals only. What opens a sealed key needs the pool's private key, and is in `lacre_backend.node.opened_keys`.
- A key counts for the gateway that made it, for one pool key and for about ten minutes. It can make no grant.
- The MAC stands beside the receipt's signature, which clients and auditors verify. Without a MAC, the signature decides.
- A sealed key is base64url of `hdr ‖ enc ‖ ciphertext`, in HPKE's base mode (RFC 9180). `info` is `lacre settlement key 1`, a
  zero byte and `hdr`. The `aad` is the pool's name and the gateway's, each after its length in two bytes.
- A MAC is `HMAC-SHA256(key, label ‖ receipt)`. The label is `lacre receipt MAC 1` and a zero byte.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from lacre.errors import LacreError
from lacre.jose.jws import b64u
from lacre.runtime.records import record
from lacre.trust.manifest import Pool
from lacre.wire import hpke
from lacre.wire.framing import TAG
from lacre.wire.header import MAX_HEADER, KeyConfig, SealedHeader
from lacre.wire.wiping import overwrite

SETTLE: Final = "Settle"  # the header of the work's message that carries the sealed key
KEY_BYTES: Final = 32
SEALED_KEY: Final = KEY_BYTES + TAG  # bytes after `hdr ‖ enc`
MAX_SEALED: Final = -(-(MAX_HEADER + SEALED_KEY) * 4 // 3)  # characters, with X-Wing
LIFETIME: Final = 600.0  # seconds in which a gateway gives one key to requests
_INFO: Final = b"lacre settlement key 1\x00"
_MAC: Final = b"lacre receipt MAC 1\x00"


class SettlementKey:
    """secret: 32 bytes, which this object overwrites at its end. sealed: the same for workers; empty at a worker."""

    __slots__ = ("_secret", "doubted", "sealed")

    def __init__(self, secret: bytearray, sealed: str = "") -> None:
        self._secret = secret
        self.sealed = sealed
        self.doubted = False  # whether the log has told of a wrong MAC under it

    def mac(self, receipt: bytes) -> bytes:
        return hmac.digest(self._secret, _MAC + receipt, "sha256")

    def __del__(self, wipe: Callable[[bytearray], None] = overwrite) -> None:
        wipe(self._secret)  # an argument, because modules may be gone before the last key is


def info(header: SealedHeader) -> bytes:
    """HPKE's `info`: a sealed key never opens as a request, nor a request as a sealed key."""
    return _INFO + header.identifiers


def bound_to(pool: str, gateway: str) -> bytes:
    """The `aad`: who may use the key, and with whom."""
    return b"".join(len(name).to_bytes(2, "big") + name for name in (pool.encode(), gateway.encode()))


def seal(config: KeyConfig, secret: bytearray, pool: str, gateway: str) -> str:
    """The secret for the holders of the pool's private key. Raises InvalidMessage or UnsupportedSuite."""
    suite = config.suite()
    shared, enc = hpke.encapsulate(config.kem, config.public_key)
    header = SealedHeader(config.key_id, suite, enc)
    sealed = hpke.Context(suite, shared, info(header)).aead.seal(secret, bound_to(pool, gateway))
    return b64u(header.raw + sealed)


@record(frozen=True, slots=True)
class _Held:
    """key: None if it could not be sealed. pool: as the manifest had it. until: on the monotonic clock."""

    key: SettlementKey | None
    config: KeyConfig
    pool: Pool
    until: float


class SettlementKeys:
    """The keys of one gateway's process. gateway: its name on the fabric. clock: monotonic seconds.

    It holds one key for each key of the manifest that requests are sealed to.
    """

    def __init__(self, gateway: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.gateway = gateway
        self._clock = clock
        self._held: Mapping[tuple[str, int], _Held] = {}

    def of(self, name: str, pool: Pool, key_id: int) -> SettlementKey | None:
        """For a request to this pool, sealed to the key of this id. None: only signatures can settle it."""
        held = self._held.get((name, key_id))
        if held is not None and held.pool is pool and self._clock() < held.until:
            return held.key
        return self._renewed(name, pool, key_id, held)

    def _renewed(self, name: str, pool: Pool, key_id: int, held: _Held | None) -> SettlementKey | None:
        config = next((key.config for key in pool.keys if key.config.key_id == key_id), None)
        if config is None:
            return None
        now = self._clock()
        if held is not None and held.config == config and now < held.until:  # only the manifest is newer
            made = _Held(held.key, config, pool, held.until)
        else:
            made = _Held(self._made(name, config), config, pool, now + LIFETIME)
        self._held = {at: other for at, other in self._held.items() if now < other.until} | {(name, key_id): made}
        return made.key

    def _made(self, pool: str, config: KeyConfig) -> SettlementKey | None:
        drawn = os.urandom(KEY_BYTES)
        secret = bytearray(drawn)
        overwrite(drawn)
        try:
            return SettlementKey(secret, seal(config, secret, pool, self.gateway))
        except LacreError:  # this side lacks the pool's KEM, or the pool's key is invalid: workers still sign
            overwrite(secret)
            return None
