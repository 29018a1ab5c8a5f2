"""Google Cloud KMS as its REST reference describes it, not the service itself: `encrypt` and `decrypt` of a symmetric key, and
the token endpoint of a service account, which verifies the signed assertion.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
from pathlib import Path
from urllib.parse import parse_qs

import jwt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.operate.nats_server import free_port
from parts.key_services import Key
from parts.key_services.http import Answer, Asked, Loopback

RING = "projects/p/locations/europe-west3/keyRings/lacre/cryptoKeys"
_CALL = re.compile(rf"/v1/({RING}/[\w-]+):(encrypt|decrypt)")
_AUDIENCE = "https://oauth2.googleapis.com/token"


def _error(code: int, status: str, message: str) -> Answer:
    return code, {"error": {"code": code, "message": message, "status": status}}


_NO_KEY = _error(404, "NOT_FOUND", "CryptoKey not found.")
_WRONG = _error(400, "INVALID_ARGUMENT", "Decryption failed: the ciphertext is invalid.")


class Google:
    revokes = True

    def __init__(self, folder: Path) -> None:
        self._keys: dict[str, bytes] = {}
        self._disabled: set[str] = set()
        self._token = secrets.token_urlsafe(32)
        self._signer = rsa.generate_private_key(65537, 2048)
        self._server = Loopback(self._answer)
        self._secret = self._signer.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        account = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "1",
            "private_key": self._secret,
            "client_email": "worker@p.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"{self._server.origin}/token",
        }
        write_secret(folder / "account.json", json.dumps(account).encode())
        self.secrets = (self._token, self._secret.splitlines()[1])
        self.environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(folder / "account.json"), "NO_PROXY": "127.0.0.1"}
        self.absent = f"gcpkms://{RING}/none?endpoint=http://127.0.0.1:{free_port()}"

    def key(self) -> Key:
        name = f"{RING}/pool-{secrets.token_hex(4)}"
        self._keys[name] = os.urandom(32)
        return Key(f"gcpkms://{name}?endpoint={self._server.origin}", name)

    def revoke(self, key: Key) -> None:
        self._disabled.add(key.name)

    def close(self) -> None:
        self._server.close()

    def _answer(self, asked: Asked) -> Answer:
        if asked.path == "/token":
            return self._grant(asked)
        if asked.headers.get("authorization") != f"Bearer {self._token}":
            return _error(401, "UNAUTHENTICATED", "Invalid credentials.")
        call = _CALL.fullmatch(asked.path)
        if call is None or call[1] not in self._keys:
            return _NO_KEY
        name, operation = call[1], call[2]
        if name in self._disabled:
            return _error(400, "FAILED_PRECONDITION", f"{name}/cryptoKeyVersions/1 is not enabled, current state is: DISABLED.")
        aead = AESGCM(self._keys[name])
        bound = base64.b64decode(asked.members["additionalAuthenticatedData"])
        if operation == "encrypt":
            nonce = os.urandom(12)
            sealed = nonce + aead.encrypt(nonce, base64.b64decode(asked.members["plaintext"]), bound)
            version, text = f"{name}/cryptoKeyVersions/1", base64.b64encode(sealed).decode()
            return 200, {"name": version, "ciphertext": text, "protectionLevel": "HSM"}
        sealed = base64.b64decode(asked.members["ciphertext"])
        try:
            plaintext = aead.decrypt(sealed[:12], sealed[12:], bound)
        except (InvalidTag, ValueError):
            return _WRONG
        return 200, {"plaintext": base64.b64encode(plaintext).decode(), "usedPrimary": True, "protectionLevel": "HSM"}

    def _grant(self, asked: Asked) -> Answer:
        form = parse_qs(asked.body.decode())
        assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
        said = jwt.decode(form["assertion"][0], self._signer.public_key(), algorithms=["RS256"], audience=_AUDIENCE)
        assert said["scope"] == "https://www.googleapis.com/auth/cloudkms"
        return 200, {"access_token": self._token, "expires_in": 3599, "token_type": "Bearer"}
