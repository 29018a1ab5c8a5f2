"""What a gateway tells the worker of a request while it runs (stop; the reader took so much), and the proof that it does.

Rules:
- Only the gateway that sent a request may cancel it or renew its credit. NATS does not hold that by itself: whoever may ask
  JetStream anything may have the answer sent to any subject of its own account, also to the one on which a colleague hears.
- So a request carries a key, which only its gateway and the worker that pulled it know. An order has an HMAC by that key, over
  all that it says (SHA-256, RFC 2104). The key is derived from the gateway's password and the request's name: a gateway can
  prove its orders about requests that it has forgotten, and about no other gateway's.
- A colleague that hears an order may repeat it. That does no harm: a cancelled request stays so, and credit is a sum that only
  grows.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final

KEY: Final = "Order-Key"  # the header of the request
PROOF: Final = "Proof"  # the header of an order
_SIZE: Final = 16  # bytes of a key and of a proof: 128 bits
CANCEL: Final = b"cancel"


class OrderKeys:
    """A gateway's keys: one for each of its requests, none of which is kept.

    password: of the gateway's credential. With it, a gateway that was started again can end what its predecessor left running.
    """

    def __init__(self, password: str | None = None) -> None:
        self._secret = os.urandom(32) if password is None else hmac.digest(password.encode(), b"lacre orders", hashlib.sha256)

    def of(self, pool: str, request_id: str) -> bytes:
        """16 bytes. Neither a pool's name nor a request's has a dot in it."""
        return _mac(self._secret, f"{pool}.{request_id}".encode())


def proof(key: bytes, order: bytes) -> str:
    """32 hex digits. order: `CANCEL`, or the digits of a credit."""
    return _mac(key, order).hex()


def proven(key: bytes | None, order: bytes, given: str) -> bool:
    """key: of the request; None where its gateway is of a version without them, and its orders have no proof."""
    return key is None or hmac.compare_digest(proof(key, order).encode(), given.encode("utf-8", "replace"))


def parse_key(text: str | None) -> bytes | None:
    """Raises ValueError for what is no key."""
    if text is None:
        return None
    key = bytes.fromhex(text)
    if len(key) != _SIZE:
        raise ValueError("an order key has 16 bytes")
    return key


def _mac(key: bytes, said: bytes) -> bytes:
    return hmac.new(key, said, hashlib.sha256).digest()[:_SIZE]
