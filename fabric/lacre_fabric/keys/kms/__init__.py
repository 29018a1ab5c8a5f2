"""Key management services that wrap the pools' private keys: one protocol, and which service, by an address.

    plain:                                         no service: the key files are as they are, 0600
    file:/PATH                                     a local key file, made where there is none
    awskms:///KEY?region=REGION                    AWS KMS; KEY: an ARN or alias/NAME
    gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K
    azurekms://NAME.vault.azure.net/KEY            Azure Key Vault or managed HSM
    vault://HOST[:PORT]/MOUNT/KEY                  transit of Vault or OpenBao
    pkcs11:token=T;object=K?module-path=/PATH&pin-source=/PATH     (RFC 7512)

Rules:
- An address holds no secret. Tokens and PINs come from 0600 files or from where the provider's own tools look for them.
- A service's library is imported when an address asks for it, and not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from lacre.errors import SettingsError
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import Context, ExtraMissing, KeyWithheld, Kms, KmsError, KmsUnreachable, WrongWrapping

__all__ = [
    "PLAIN",
    "Context",
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
# Each scheme's module, which has `connect`; what it needs that is not always there, and the extra that brings it.
_SERVICES: Final = {
    "file": ("local", "cryptography", ""),
    "awskms": ("aws", "boto3", "kms-aws"),
    "gcpkms": ("google", "google.auth.transport.requests", "kms-gcp"),
    "azurekms": ("azure", "azure.identity", "kms-azure"),
    "vault": ("vault", "httpx2", "kms-vault"),
    "pkcs11": ("pkcs11", "pkcs11", "kms-pkcs11"),
}


def check(address: str) -> str:
    """The address, where it is one. Raises SettingsError, which does not repeat it."""
    if address != PLAIN:
        _service(Address.parse(address))
    return address


def connect(address: str) -> Kms | None:
    """None for `plain:`. Nothing is asked of the service yet. Raises SettingsError."""
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
        raise SettingsError(f"no key management service of this kind is known: an address begins with one of {known}")
    return found
