"""Ed25519 by libsodium: the same signatures and the same answers as `lacre.jose.ed25519`, in half of the time.

libsodium refuses by itself what that module refuses before it asks OpenSSL. tests/fabric/test_ed25519.py compares both.
"""

from __future__ import annotations

import nacl.bindings
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.exceptions import BadSignatureError

from lacre.jose.ed25519 import KEY_BYTES, SIGNATURE_BYTES


class Signer:
    """A private key that signs. public: its public half, 32 bytes."""

    __slots__ = ("_secret", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.public = key.public_key().public_bytes_raw()
        self._secret = key.private_bytes_raw() + self.public

    def sign(self, data: bytes, /) -> bytes:
        return nacl.bindings.crypto_sign(data, self._secret)[:SIGNATURE_BYTES]


def verifies(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the public key signed the data. Lengths may be wrong."""
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + data, public)
    except BadSignatureError:
        return False
    return True
