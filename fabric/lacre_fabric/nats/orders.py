"""A gateway's orders to the worker of an open request (cancel; renew credit), and their proof of origin.

Rules:
- Only the gateway that sent a request may cancel it or renew its credit. NATS does not enforce that. A worker that may use
  JetStream can have an answer sent to any subject of its account. That includes the one on which another worker receives
  orders.
- So each request carries a key that only its gateway and the worker that pulled it know. An order carries an HMAC over its
  whole content with that key (SHA-256, RFC 2104).
- The key is derived from the gateway's password and the request's id. So a gateway can prove orders for requests that it has
  forgotten, and for no other gateway's.
- Another worker that sees an order may replay it. That is harmless: a cancelled request stays cancelled, and credit is a total
  that only grows.
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
    """A gateway's order keys: one per request, derived when needed.

    password: of the gateway's credential. With it, a restarted gateway can end requests that it left running.
    """

    def __init__(self, password: str | None = None) -> None:
        secret = os.urandom(32) if password is None else hmac.digest(password.encode(), b"lacre orders", hashlib.sha256)
        # Copied for each key. `hmac.digest` would let go of the interpreter's lock, and wait for it, once a request.
        self._begun = hmac.new(secret, digestmod="sha256")

    def of(self, pool: str, request_id: str) -> bytes:
        """16 bytes. Pool names and request ids contain no dots."""
        mac = self._begun.copy()
        mac.update(f"{pool}.{request_id}".encode())
        return mac.digest()[:_SIZE]


def proof(key: bytes, order: bytes) -> str:
    """32 hex digits. order: `CANCEL`, or the digits of a credit."""
    return _mac(key, order).hex()


def proven(key: bytes | None, order: bytes, given: str) -> bool:
    """Whether the proof is valid. key: the request's; None if its gateway is of an older version, whose orders have no
    proof.
    """
    return key is None or hmac.compare_digest(proof(key, order).encode(), given.encode("utf-8", "replace"))


def parse_key(text: str | None) -> bytes | None:
    """Raises ValueError for an invalid key."""
    if text is None:
        return None
    key = bytes.fromhex(text)
    if len(key) != _SIZE:
        raise ValueError("an order key has 16 bytes")
    return key


def _mac(key: bytes, said: bytes) -> bytes:
    return hmac.digest(key, said, "sha256")[:_SIZE]
