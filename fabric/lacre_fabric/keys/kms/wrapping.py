"""A pool's key files, wrapped by a key management service or as they are.

A file says itself which of both it is. One that is wrapped needs the service; one that is not, where a service is set, is
refused: whoever can write the folder could else put a key of his own there, and nobody would ask the service.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lacre.errors import SettingsError
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.kms import connect
from lacre_fabric.keys.kms.envelope import is_sealed, seal, unseal
from lacre_fabric.keys.kms.protocol import EncryptionContext, Kms, KmsError
from lacre_fabric.keys.secret_files import read_secret, write_secret


@dataclass(frozen=True, slots=True)
class Keeping:
    """How the keys of one pool are kept. kms: None where they are not wrapped."""

    kms: Kms | None
    pool: str

    def pool_key(self, key_id: int) -> EncryptionContext:
        return EncryptionContext("pool-key", self.pool, key_id)

    def receipt_key(self) -> EncryptionContext:
        return EncryptionContext("receipt-key", self.pool)

    def write(self, path: Path, secret: bytes | bytearray, context: EncryptionContext, public: bytes = b"") -> None:
        """public: what of a signing key everybody may know. Raises KmsError or SettingsError."""
        write_secret(path, self.encoded(secret, context, public))

    def encoded(self, secret: bytes | bytearray, context: EncryptionContext, public: bytes = b"") -> bytes | bytearray:
        """What `write` writes."""
        return secret if self.kms is None else seal(self.kms, secret, context, public)

    def read(self, path: Path, context: EncryptionContext) -> bytearray:
        """The secret; overwrite it after use. Raises KmsError or SettingsError, which name the file."""
        content = read_secret(path)
        if not is_sealed(content):
            if self.kms is None:
                return content
            overwrite(content)
            raise SettingsError(f"{path} is not wrapped, and `kms` is set: `lacre keys rewrap` wraps what is there")
        if self.kms is None:
            raise SettingsError(f"{path} is wrapped by a key management service: set `kms` to its address")
        try:
            return unseal(self.kms, content, context)
        except KmsError as exc:
            exc.args = (f"{path}: {exc}",)
            raise


@contextmanager
def keeping(address: str, pool: str) -> Iterator[Keeping]:
    """By the service at `address`. Raises SettingsError."""
    kms = connect(address)
    try:
        yield Keeping(kms, pool)
    finally:
        if kms is not None:
            kms.close()
