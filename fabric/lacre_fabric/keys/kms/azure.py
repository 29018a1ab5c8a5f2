"""Azure Key Vault and managed HSM: `azurekms://NAME.vault.azure.net/KEY[/VERSION]`, an RSA key that may wrap and unwrap.

The service does not support associated data: only the envelope binds the context. A wrapped key names the key version that
wrapped it, and that version unwraps it. Credentials: azure-identity's default chain (workload identity, managed identity, `az
login`).
"""

from __future__ import annotations

import json
from typing import Any, Final

from azure.core.exceptions import AzureError, ClientAuthenticationError
from azure.identity import DefaultAzureCredential

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime.hosts import is_loopback
from lacre.runtime.json_objects import parse_object
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import EncryptionContext, KeyWithheld, Kms, KmsUnreachable, WrongWrapping
from lacre_fabric.keys.kms.service import HttpService, Said

_API: Final = "7.4"
_ALGORITHM: Final = "RSA-OAEP-256"


def connect(address: Address) -> Kms:
    address.only()
    name, _, version = address.path.strip("/").partition("/")
    if not address.host or not name or "/" in version:
        raise SettingsError("azurekms: needs vault and key, for example azurekms://NAME.vault.azure.net/KEY")
    return AzureKeys(address, name, version)


class AzureKeys:
    scheme = "azurekms"
    binds = False

    def __init__(self, address: Address, name: str, version: str) -> None:
        self._name, self._version = name, version
        # A token is for one kind of vault in one cloud: vault.azure.net, managedhsm.azure.net, vault.azure.cn and so on.
        kind = "vault.azure.net" if is_loopback(address.host) else address.host.partition(".")[2]
        self._scope = f"https://{kind}/.default"
        self._service = HttpService(f"the key vault at {address.host}", address.origin)
        self._credential: Any = DefaultAzureCredential()

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:  # noqa: ARG002 - see above
        said = self._ask("wrapkey", self._version, b64u(bytes(data_key)))
        return json.dumps({"version": said.text("kid").rpartition("/")[2], "value": said.text("value")}).encode()

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:  # noqa: ARG002 - see above
        try:
            members = parse_object(wrapped, "the wrapped key")
            version, value = str(members["version"]), str(members["value"])
            if not version.isalnum():  # it becomes part of a path
                raise ValueError
        except (InvalidMessage, ValueError, KeyError) as exc:
            raise WrongWrapping("the wrapped key is not from a key vault") from exc
        said = self._ask("unwrapkey", version, value)
        try:
            return bytearray(b64u_decode(said.text("value")))
        except InvalidMessage as exc:
            raise WrongWrapping(f"{self._service.name} answered with no data key") from exc

    def close(self) -> None:
        self._service.close()
        self._credential.close()

    def _ask(self, operation: str, version: str, value: str) -> Said:
        key = f"{self._name}/{version}" if version else self._name
        body = {"alg": _ALGORITHM, "value": value}
        headers = {"Authorization": f"Bearer {self._token()}"}
        said = self._service.post(f"/keys/{key}/{operation}?api-version={_API}", body, headers)
        if not said.ok:
            raise self._refused(said, operation)
        return said

    def _refused(self, said: Said, operation: str) -> KeyWithheld | WrongWrapping:
        """403: no permission, or a disabled or expired key. 404: a removed key. 400: the wrapped key does not open."""
        what = f"{self._service.name} does not {operation} with {self._name}"
        if said.status in (401, 403, 404, 409):
            return KeyWithheld(f"{what} (HTTP {said.status})")
        return WrongWrapping(f"{what}: it rejects this wrapped key")

    def _token(self) -> str:
        try:
            return str(self._credential.get_token(self._scope).token)
        except ClientAuthenticationError:
            raise SettingsError("azurekms: no credentials: give this process an identity (docs/kms.md)") from None
        except AzureError as exc:
            raise KmsUnreachable(f"Azure gives no access token ({type(exc).__name__})") from None
