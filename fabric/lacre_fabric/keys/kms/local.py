"""A key file on this machine: 32 random bytes, mode 0600. It protects wrapped keys on other disks, in backups and in
transit.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lacre.errors import SettingsError
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import DATA_KEY, EncryptionContext, KeyWithheld, Kms, WrongWrapping
from lacre_fabric.keys.secret_files import read_secret, write_secret

_NONCE = 12  # bytes; random for each data key, of which there are a few a day


def connect(address: Address) -> Kms:
    address.only()
    path = Path(address.path)
    if address.host or not path.is_absolute():
        raise SettingsError("file: needs the absolute path of a key file, for example file:/etc/lacre/kms.key")
    return LocalFile(path)


class LocalFile:
    """The first `wrap` creates the file. Deleting the file revokes everything that it wrapped."""

    scheme = "file"
    binds = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:
        if not self._path.exists():
            write_secret(self._path, os.urandom(DATA_KEY))
        key, nonce = self._read(), os.urandom(_NONCE)
        try:
            return nonce + AESGCM(key).encrypt(nonce, data_key, context.encode())
        finally:
            overwrite(key)

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        key = self._read()
        try:
            return bytearray(AESGCM(key).decrypt(wrapped[:_NONCE], wrapped[_NONCE:], context.encode()))
        except (InvalidTag, ValueError) as exc:
            raise WrongWrapping(f"{self._path} does not open the wrapped key") from exc
        finally:
            overwrite(key)

    def close(self) -> None:
        """Nothing to close."""

    def _read(self) -> bytearray:
        if not self._path.exists():
            raise KeyWithheld(f"the key file {self._path} is gone")
        key = read_secret(self._path)
        if len(key) != DATA_KEY:
            raise SettingsError(f"{self._path} must hold {DATA_KEY} bytes: restore it")
        return key
