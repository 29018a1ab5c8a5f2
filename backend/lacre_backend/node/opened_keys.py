"""A worker's side of settlement keys: opens those that gateways sealed to the pool. See `lacre_fabric.work.settlement_keys`.

Rules:
- Call it once the grant is verified. The fabric may put other bytes in the place of a sealed key, at the cost of one try each.
- A key that does not open is no error. Then the receipts of its requests have their signature alone.
- At most `MOST` tries are remembered. A key is overwritten once it is forgotten and no request uses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from lacre.errors import LacreError
from lacre.jose.jws import b64u_decode
from lacre.wire import hpke
from lacre.wire.header import SealedHeader
from lacre.wire.opening import PrivateKey
from lacre_fabric.work.settlement_keys import KEY_BYTES, MAX_SEALED, SEALED_KEY, SettlementKey, bound_to, info

# More than the processes of all gateways of a site, twice, because a key may just have been replaced. Each takes 3 KiB at most.
MOST: Final = 256


class OpenedKeys:
    """pool: whose private keys open them."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._found: OrderedDict[tuple[str, str], tuple[PrivateKey, SettlementKey | None]] = OrderedDict()

    def find(self, sealed: str, gateway: str, key_id: int, keys: Mapping[int, PrivateKey]) -> SettlementKey | None:
        """The key in `sealed` that this gateway made. key_id: of the key that the request itself was sealed to. keys: of the
        pool, as this worker holds them now.
        """
        key = keys.get(key_id)
        if key is None or not 0 < len(sealed) <= MAX_SEALED:
            return None
        found = self._found.get((gateway, sealed))
        if found is not None and found[0] is key:
            self._found.move_to_end((gateway, sealed))
            return found[1]
        self._forget(keys)
        opened = self._opened(sealed, gateway, key)
        self._found[gateway, sealed] = key, opened
        return opened

    def _forget(self, keys: Mapping[int, PrivateKey]) -> None:
        """Drops those of pool keys that this worker no longer holds, and if there are too many, the least used one."""
        for at, (key, _) in list(self._found.items()):
            if keys.get(key.config.key_id) is not key:
                del self._found[at]
        if len(self._found) >= MOST:
            self._found.popitem(last=False)

    def _opened(self, sealed: str, gateway: str, key: PrivateKey) -> SettlementKey | None:
        secret = bytearray(KEY_BYTES)
        try:
            data = b64u_decode(sealed)
            header = SealedHeader.parse(data)
            ciphertext = data[len(header.raw) :]
            if len(ciphertext) != SEALED_KEY or not key.config.offers(header.suite):
                return None
            context = hpke.Context(header.suite, key.decapsulate(header.enc), info(header))
            context.aead.open_into(ciphertext, bound_to(self._pool, gateway), memoryview(secret))
        except LacreError:
            return None
        return SettlementKey(secret)
