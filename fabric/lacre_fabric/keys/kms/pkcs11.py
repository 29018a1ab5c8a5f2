"""A hardware security module through PKCS#11: `pkcs11:token=T;object=K?module-path=/PATH&pin-source=/PATH` (RFC 7512).

K: an AES key with CKA_ENCRYPT and CKA_DECRYPT. It seals data keys with AES-GCM, with the context as associated data. The PIN is
read from its 0600 file at each login. To revoke a key, destroy it or remove its CKA_DECRYPT.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import pkcs11
from pkcs11 import exceptions

from lacre.errors import SettingsError
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import EncryptionContext, KeyWithheld, Kms, KmsUnreachable, WrongWrapping
from lacre_fabric.keys.secret_files import read_secret

_NONCE: Final = 12  # bytes; random, for a few data keys a day
_TAG: Final = 128  # bits
_PIN: Final = (exceptions.PinIncorrect, exceptions.PinLocked, exceptions.PinInvalid, exceptions.PinLenRange)


def connect(address: Address) -> Kms:
    address.only("module-path", "pin-source")
    named = dict(part.partition("=")[::2] for part in address.path.split(";"))
    module, pin = address.file("module-path"), address.file("pin-source")
    if module is None or pin is None or set(named) != {"token", "object"}:
        raise SettingsError("pkcs11: write pkcs11:token=T;object=K?module-path=/PATH&pin-source=/PATH")
    return Pkcs11(str(module), unquote(named["token"]), unquote(named["object"]), pin)


class Pkcs11:
    """Opens a session for each request. A permanent session would survive a removed token or a changed PIN."""

    scheme = "pkcs11"
    binds = True

    def __init__(self, module: str, token: str, label: str, pin: Path) -> None:
        self._module, self._token, self._label, self._pin = module, token, label, pin

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:
        nonce = os.urandom(_NONCE)
        with self._key(pkcs11.Attribute.ENCRYPT) as key:
            try:
                return nonce + bytes(key.encrypt(bytes(data_key), **_gcm(nonce, context)))
            except exceptions.PKCS11Error as exc:
                raise KmsUnreachable(
                    f"token {self._token} does not encrypt with {self._label} ({type(exc).__name__})"
                ) from None

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        with self._key(pkcs11.Attribute.DECRYPT) as key:
            try:
                return bytearray(key.decrypt(wrapped[_NONCE:], **_gcm(wrapped[:_NONCE], context)))
            except exceptions.PKCS11Error as exc:  # SoftHSM reports an invalid tag as "general error"
                raise WrongWrapping(
                    f"{self._label} of token {self._token} does not decrypt this ({type(exc).__name__})"
                ) from None

    def close(self) -> None:
        """Nothing to close."""

    @contextmanager
    def _key(self, use: Any) -> Iterator[Any]:
        """The key, if it allows this use. Checked first, because each module reports a violation differently."""
        with self._session() as session:
            try:
                key = session.get_key(object_class=pkcs11.ObjectClass.SECRET_KEY, label=self._label)
                allowed = key[use]
            except (exceptions.NoSuchKey, exceptions.MultipleObjectsReturned) as exc:
                raise KeyWithheld(
                    f"token {self._token} must have exactly one key {self._label} ({type(exc).__name__})"
                ) from None
            if not allowed:
                raise KeyWithheld(f"{self._label} of token {self._token} may not {use.name.lower()}")
            yield key

    @contextmanager
    def _session(self) -> Iterator[Any]:
        pin = read_secret(self._pin)
        try:
            session = pkcs11.lib(self._module).get_token(token_label=self._token).open(user_pin=pin.decode().strip())
        except exceptions.NoSuchToken:
            raise KmsUnreachable(f"no token {self._token} is present") from None
        except _PIN as exc:
            raise KeyWithheld(f"token {self._token} rejects the PIN in {self._pin} ({type(exc).__name__})") from None
        except exceptions.PKCS11Error as exc:
            raise KmsUnreachable(
                f"the module {self._module} does not open token {self._token} ({type(exc).__name__})"
            ) from None
        finally:
            overwrite(pin)
        with session:
            yield session


def _gcm(nonce: bytes, context: EncryptionContext) -> dict[str, Any]:
    parameters = pkcs11.GCMParams(nonce, context.encode(), _TAG)
    return {"mechanism": pkcs11.Mechanism.AES_GCM, "mechanism_param": parameters}
