"""A pool's key files, either wrapped by a KMS or plain.

Each file says itself whether it is wrapped. A wrapped file needs the KMS. A plain file is refused if a KMS is set. Otherwise
anyone who can write to the folder could add their own key without the KMS.
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
    """How one pool's keys are stored. kms: None if they are not wrapped."""

    kms: Kms | None
    pool: str

    def pool_key(self, key_id: int) -> EncryptionContext:
        return EncryptionContext("pool-key", self.pool, key_id)

    def receipt_key(self) -> EncryptionContext:
        return EncryptionContext("receipt-key", self.pool)

    def write(self, path: Path, secret: bytes | bytearray, context: EncryptionContext, public: bytes = b"") -> None:
        """public: the public part of a signing key. Raises KmsError or SettingsError."""
        write_secret(path, self.encoded(secret, context, public))

    def encoded(self, secret: bytes | bytearray, context: EncryptionContext, public: bytes = b"") -> bytes | bytearray:
        """The bytes that `write` writes."""
        return secret if self.kms is None else seal(self.kms, secret, context, public)

    def read(self, path: Path, context: EncryptionContext) -> bytearray:
        """The secret; overwrite it after use. Raises KmsError or SettingsError, which name the file."""
        content = read_secret(path)
        if not is_sealed(content):
            if self.kms is None:
                return content
            overwrite(content)
            raise SettingsError(f"{path} is not wrapped, but `kms` is set: wrap existing keys with `lacre keys rewrap`")
        if self.kms is None:
            raise SettingsError(f"{path} is wrapped by a KMS: set `kms` to its address")
        try:
            return unseal(self.kms, content, context)
        except KmsError as exc:
            exc.args = (f"{path}: {exc}",)
            raise


@contextmanager
def keeping(address: str, pool: str) -> Iterator[Keeping]:
    """Uses the KMS at `address`. Raises SettingsError."""
    kms = connect(address)
    try:
        yield Keeping(kms, pool)
    finally:
        if kms is not None:
            kms.close()
