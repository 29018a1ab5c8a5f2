"""Azure Key Vault as its REST reference describes it, not the service itself: `wrapkey` and `unwrapkey` of an RSA key, and the
token endpoint of a managed identity, as App Service has it.
"""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u, b64u_decode
from lacre_fabric.operate.nats_server import free_port
from parts.key_services import Key
from parts.key_services.http import Answer, Asked, Loopback

_CALL = re.compile(r"/keys/([\w-]+)(?:/(\w+))?/(wrapkey|unwrapkey)")
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Azure:
    revokes = True

    def __init__(self, folder: Path) -> None:
        self._keys: dict[str, tuple[str, rsa.RSAPrivateKey]] = {}
        self._disabled: set[str] = set()
        self._token, self._header = secrets.token_urlsafe(32), secrets.token_hex(16)
        self._server = Loopback(self._answer)
        self.secrets = (self._token, self._header)
        self.environment = {
            "IDENTITY_ENDPOINT": f"{self._server.origin}/msi/token",
            "IDENTITY_HEADER": self._header,
            "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
            "NO_PROXY": "127.0.0.1",
        }
        self.absent = f"azurekms://127.0.0.1:{free_port()}/none"

    def key(self) -> Key:
        name = f"pool-{secrets.token_hex(4)}"
        self._keys[name] = (secrets.token_hex(16), rsa.generate_private_key(65537, 2048))
        return Key(f"azurekms://127.0.0.1:{self._server.port}/{name}", name)

    def revoke(self, key: Key) -> None:
        self._disabled.add(key.name)

    def close(self) -> None:
        self._server.close()

    def _answer(self, asked: Asked) -> Answer:
        if asked.path == "/msi/token":
            assert asked.headers["x-identity-header"] == self._header
            assert asked.query["resource"] == "https://vault.azure.net"
            until, resource = str(int(time.time()) + 3600), asked.query["resource"]
            return 200, {"access_token": self._token, "expires_on": until, "resource": resource, "token_type": "Bearer"}
        if asked.headers.get("authorization") != f"Bearer {self._token}":
            return _error(401, "Unauthorized")
        call = _CALL.fullmatch(asked.path)
        assert call is not None and asked.query == {"api-version": "7.4"}
        version, key = self._keys.get(call[1], ("", None))
        if key is None or call[2] not in (None, version):
            return _error(404, "KeyNotFound")
        if call[1] in self._disabled:
            return _error(403, "Forbidden")
        assert asked.members["alg"] == "RSA-OAEP-256"
        try:
            value = b64u_decode(asked.members["value"])
            done = key.public_key().encrypt(value, _OAEP) if call[3] == "wrapkey" else key.decrypt(value, _OAEP)
        except (ValueError, InvalidMessage):
            return _error(400, "BadParameter")
        return 200, {"kid": f"{self._server.origin}/keys/{call[1]}/{version}", "value": b64u(done)}


def _error(status: int, code: str) -> Answer:
    return status, {"error": {"code": code, "message": "as the reference has it"}}
