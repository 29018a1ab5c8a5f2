"""Google Cloud KMS: `gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K[?endpoint=https://...]`, a symmetric key.

The context is Google's additional authenticated data. Credentials: Application Default Credentials, through google-auth
(workload identity, a service account file, `gcloud`). The two requests are made here, because the full client would need gRPC.
"""

from __future__ import annotations

import re
from typing import Any, Final

from google.auth import default as default_credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import Request

from lacre.errors import SettingsError
from lacre_fabric.keys.kms.address import Address, endpoint
from lacre_fabric.keys.kms.protocol import EncryptionContext, KeyWithheld, Kms, KmsUnreachable, WrongWrapping
from lacre_fabric.keys.kms.service import HttpService, Said, base64_text

_ENDPOINT: Final = "https://cloudkms.googleapis.com"
_SCOPE: Final = "https://www.googleapis.com/auth/cloudkms"
_KEY: Final = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")


def connect(address: Address) -> Kms:
    address.only("endpoint")
    key = f"{address.host}{address.path}"
    if not _KEY.fullmatch(key):
        raise SettingsError("gcpkms: write gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K")
    return GoogleKms(key, endpoint(address.options.get("endpoint", _ENDPOINT)))


class GoogleKms:
    scheme = "gcpkms"
    binds = True

    def __init__(self, key: str, origin: str) -> None:
        self._key = key
        self._service = HttpService("Google Cloud KMS", origin)
        self._credentials: Any = None

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:
        return self._ask("encrypt", {"plaintext": base64_text(data_key)}, context).binary("ciphertext")

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        return bytearray(self._ask("decrypt", {"ciphertext": base64_text(wrapped)}, context).binary("plaintext"))

    def close(self) -> None:
        self._service.close()

    def _ask(self, operation: str, body: dict[str, object], context: EncryptionContext) -> Said:
        body |= {"additionalAuthenticatedData": base64_text(context.encode())}
        said = self._service.post(f"/v1/{self._key}:{operation}", body, {"Authorization": f"Bearer {self._token()}"})
        if not said.ok:
            raise self._refused(said, operation)
        return said

    def _refused(self, said: Said, operation: str) -> KeyWithheld | WrongWrapping:
        """Google answers 400 to both: FAILED_PRECONDITION for a disabled or destroyed version, INVALID_ARGUMENT if the wrapped
        key does not open.
        """
        error = said.members.get("error")
        status = error.get("status") if isinstance(error, dict) else None
        if said.status in (401, 403, 404) or status == "FAILED_PRECONDITION":
            return KeyWithheld(f"{self._service.name} does not {operation} with {self._key} ({status or said.status})")
        return WrongWrapping(f"{self._service.name} does not {operation} this with {self._key}")

    def _token(self) -> str:
        try:
            if self._credentials is None:
                self._credentials, _ = default_credentials(scopes=[_SCOPE])
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except DefaultCredentialsError:
            raise SettingsError("gcpkms: no credentials: give this process a service account (docs/kms.md)") from None
        except GoogleAuthError as exc:
            if exc.retryable or isinstance(exc, TransportError):
                raise KmsUnreachable(f"Google's token endpoint does not answer ({type(exc).__name__})") from None
            raise KeyWithheld(f"Google gives this account no access token ({type(exc).__name__})") from None
        return str(self._credentials.token)
