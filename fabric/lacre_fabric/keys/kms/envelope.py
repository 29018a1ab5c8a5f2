"""An envelope: a secret sealed with a data key that a KMS wraps.

Rules:
- The KMS sees only the data key, and the file has the rest. Neither opens anything without the other.
- The seal's associated data include the context, even if the KMS binds it too. So a file moved to another pool's folder or
  another key's name does not open.
- A data key seals one secret, once. Therefore the nonce may be zero.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime.json_objects import parse_object
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.kms.protocol import DATA_KEY, EncryptionContext, Kms, WrongWrapping

_MAGIC: Final = b'{"wrapped":'  # neither a PEM file nor a pool key begins like this
_NONCE: Final = bytes(12)


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A parsed wrapped key file. scheme: of the KMS. public: the public part of a signing key."""

    scheme: str
    wrapped: bytes
    content: bytes
    public: bytes = b""

    def encode(self) -> bytes:
        members = {"wrapped": b64u(self.wrapped), "by": self.scheme, "content": b64u(self.content), "public": b64u(self.public)}
        return json.dumps(members, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes | bytearray) -> WrappedKey:
        """Raises WrongWrapping."""
        try:
            members = parse_object(data, "the wrapped key")
            binary = (b64u_decode(members[name]) for name in ("wrapped", "content", "public"))
            return cls(str(members["by"]), *binary)
        except (ValueError, KeyError, TypeError, InvalidMessage) as exc:
            raise WrongWrapping("the wrapped key is damaged") from exc


def is_sealed(data: bytes | bytearray) -> bool:
    return data.startswith(_MAGIC)


def seal(kms: Kms, secret: bytes | bytearray, context: EncryptionContext, public: bytes = b"") -> bytes:
    """Raises KmsError or SettingsError."""
    data_key = bytearray(os.urandom(DATA_KEY))
    try:
        wrapped = kms.wrap(data_key, context)
        content = AESGCM(data_key).encrypt(_NONCE, secret, _bound(context, public))
    finally:
        overwrite(data_key)
    return WrappedKey(kms.scheme, wrapped, content, public).encode()


def unseal(kms: Kms, data: bytes | bytearray, context: EncryptionContext) -> bytearray:
    """The secret; overwrite it after use. Raises KmsError or SettingsError."""
    sealed = WrappedKey.parse(data)
    if sealed.scheme != kms.scheme:
        raise WrongWrapping(f"the key was wrapped by {sealed.scheme}:, but `kms` is {kms.scheme}:")
    data_key = kms.unwrap(sealed.wrapped, context)
    try:
        opened = AESGCM(data_key).decrypt(_NONCE, sealed.content, _bound(context, sealed.public))
    except (InvalidTag, ValueError) as exc:  # ValueError: a data key of another length
        raise WrongWrapping("the wrapped key does not open") from exc
    finally:
        overwrite(data_key)
    try:
        return bytearray(opened)
    finally:
        overwrite(opened)


def _bound(context: EncryptionContext, public: bytes) -> bytes:
    return context.encode() + b"\0" + public  # no context contains a zero byte
