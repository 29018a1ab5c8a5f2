"""Ed25519 signatures (RFC 8032), with one answer in every program: the strictest of the libraries that verify them.

Rules:
- RFC 8032 leaves room: OpenSSL accepts public keys of small order, and keys in a second spelling, and libsodium does not. Under
  such a key, one signature holds for many messages. So both are refused here, before OpenSSL is asked.
- A signature whose first half is a point of small order is refused too. An honest signer never makes one.
- Both libraries refuse a second half of the group's order or more, and compare the first half byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_P: Final = 2**255 - 19
_Y: Final = 2**255 - 1  # a point is its y, and above it the sign of x
_EIGHTH: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7  # the y of a point of order 8
_SMALL_ORDER: Final = frozenset({0, 1, _P - 1, _EIGHTH, _P - _EIGHTH})

# Whether the public key signed the data: public key, signature, data. Servers pass a quicker one, with the same answers.
Check = Callable[[bytes, bytes, bytes], bool]


class Signs(Protocol):
    """A private key: `Ed25519PrivateKey`, or a quicker one."""

    def sign(self, data: bytes, /) -> bytes: ...


def is_weak(point: bytes) -> bool:
    """Whether the point is of small order, or spelled in another way than its one canonical way."""
    y = int.from_bytes(point, "little") & _Y
    return y >= _P or y in _SMALL_ORDER


def verifies(public: bytes, signature: bytes, data: bytes) -> bool:
    """By OpenSSL. Lengths may be wrong."""
    if is_weak(public) or is_weak(signature[:KEY_BYTES]):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
