"""Key management services (KMS) that wrap the pools' private keys. An address in the settings chooses one (docs/kms.md).

Rules: an address contains no secret. Tokens and PINs come from 0600 files, or from where the provider's own tools look.
A service's library is imported only when its address is used.
Open `protocol.py` first: three methods. `envelope.py` wraps keys by them, and `address.py` parses an address.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from lacre.errors import SettingsError
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import (
    EncryptionContext,
    ExtraMissing,
    KeyWithheld,
    Kms,
    KmsError,
    KmsUnreachable,
    WrongWrapping,
)

__all__ = [
    "PLAIN",
    "EncryptionContext",
    "ExtraMissing",
    "KeyWithheld",
    "Kms",
    "KmsError",
    "KmsUnreachable",
    "WrongWrapping",
    "check",
    "connect",
]

PLAIN: Final = "plain:"
# For each scheme: the module with `connect`, the optional library that it needs, and the extra that installs it.
_SERVICES: Final = {
    "file": ("local", "cryptography", ""),
    "awskms": ("aws", "boto3", "kms-aws"),
    "gcpkms": ("google", "google.auth.transport.requests", "kms-gcp"),
    "azurekms": ("azure", "azure.identity", "kms-azure"),
    "vault": ("vault", "httpx2", "kms-vault"),
    "pkcs11": ("pkcs11", "pkcs11", "kms-pkcs11"),
}


def check(address: str) -> str:
    """Returns the address if it is valid. Raises SettingsError, which does not repeat it."""
    if address != PLAIN:
        _service(Address.parse(address))
    return address


def connect(address: str) -> Kms | None:
    """None for `plain:`. Does not contact the service yet. Raises SettingsError."""
    if address == PLAIN:
        return None
    parsed = Address.parse(address)
    module, needed, extra = _service(parsed)
    try:
        import_module(needed)
    except ImportError as exc:
        raise ExtraMissing(extra) from exc
    service: Kms = import_module(f"lacre_fabric.keys.kms.{module}").connect(parsed)
    return service


def _service(address: Address) -> tuple[str, str, str]:
    found = _SERVICES.get(address.scheme)
    if found is None:
        known = ", ".join(f"{scheme}:" for scheme in ("plain", *_SERVICES))
        raise SettingsError(f"unknown kind of key management service: an address begins with one of {known}")
    return found
