"""The transit engine of HashiCorp Vault or OpenBao: a key of type aes256-gcm96 or chacha20-poly1305, not derived.

`vault://HOST[:PORT]/MOUNT/KEY[?token-file=/PATH][&namespace=NAME]`. The context is transit's `associated_data`. To revoke a key
version, raise the key's `min_decryption_version` above it.

Two requests are enough, so there is no client library: code with secrets stays small. The token is read from its file each
time, so an agent can renew it at any moment.
"""

from __future__ import annotations

import os
from typing import Final

from lacre.errors import SettingsError
from lacre.runtime import folders
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.kms.address import Address
from lacre_fabric.keys.kms.protocol import EncryptionContext, KeyWithheld, Kms, WrongWrapping
from lacre_fabric.keys.kms.service import HttpService, Said, base64_text
from lacre_fabric.keys.secret_files import read_secret

_TOKENS: Final = ("VAULT_TOKEN", "BAO_TOKEN")  # where Vault's own command looks, before `~/.vault-token`


def connect(address: Address) -> Kms:
    address.only("token-file", "namespace")
    mount, _, key = address.path.strip("/").rpartition("/")
    if not address.host or not mount or not key:
        raise SettingsError("vault: needs host, mount and key, for example vault://vault.example:8200/transit/lacre")
    return Transit(address, mount, key)


class Transit:
    scheme = "vault"
    binds = True

    def __init__(self, address: Address, mount: str, key: str) -> None:
        self._mount, self._key = mount, key
        self._token_file = address.file("token-file")
        self._namespace = address.options.get("namespace")
        self._service = HttpService(f"the vault at {address.host}", address.origin)

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:
        said = self._ask("encrypt", {"plaintext": base64_text(data_key)}, context)
        return said.text("data", "ciphertext").encode()

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        try:
            text = wrapped.decode("ascii")
        except UnicodeDecodeError as exc:
            raise WrongWrapping("the wrapped key is not from transit") from exc
        return bytearray(self._ask("decrypt", {"ciphertext": text}, context).binary("data", "plaintext"))

    def close(self) -> None:
        self._service.close()

    def _ask(self, operation: str, body: dict[str, object], context: EncryptionContext) -> Said:
        headers = {"X-Vault-Token": self._token(), "X-Vault-Request": "true"}
        if self._namespace is not None:
            headers["X-Vault-Namespace"] = self._namespace
        body |= {"associated_data": base64_text(context.encode())}
        said = self._service.post(f"/v1/{self._mount}/{operation}/{self._key}", body, headers)
        if not said.ok:
            raise self._refused(said, operation)
        return said

    def _refused(self, said: Said, operation: str) -> KeyWithheld | WrongWrapping:
        """Transit uses one status for all of these, so its message decides."""
        what, words = f"{self._mount}/{self._key} of {self._service.name}", str(said.members.get("errors"))
        if "too old" in words:
            return KeyWithheld(f"{what}: the version that wrapped this was revoked (min_decryption_version)")
        if said.status in (403, 404) or "not found" in words:
            return KeyWithheld(f"{what}: unknown key, or this token may not {operation} with it")
        return WrongWrapping(f"{what} does not {operation} this")

    def _token(self) -> str:
        """Raises SettingsError."""
        if self._token_file is None:
            for name in _TOKENS:
                if token := os.environ.get(name):
                    return token
        content = read_secret(self._token_file or folders.home() / ".vault-token")
        try:
            return content.decode("ascii").strip()
        except UnicodeDecodeError as exc:
            raise SettingsError("the token file of the vault holds no token") from exc
        finally:
            overwrite(content)
