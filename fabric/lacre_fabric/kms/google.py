"""Google Cloud KMS: `gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K[?endpoint=https://...]`, a symmetric key.

The context is Google's additional authenticated data. Who it is: Application Default Credentials, by google-auth (workload
identity, a service account's file, `gcloud`). The two requests are made here: the whole client would bring gRPC along.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final

import google.auth
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.requests import Request

from lacre.errors import SettingsError
from lacre_fabric.kms.address import Address, endpoint
from lacre_fabric.kms.protocol import Context, KeyWithheld, KmsUnreachable, WrongWrapping
from lacre_fabric.kms.service import HttpService, Said

_ENDPOINT: Final = "https://cloudkms.googleapis.com"
_SCOPE: Final = "https://www.googleapis.com/auth/cloudkms"
_KEY: Final = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")


def connect(address: Address) -> GoogleKms:
    address.only("endpoint")
    key = f"{address.host}{address.path}"
    if not _KEY.fullmatch(key):
        raise SettingsError("gcpkms: wants gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K")
    return GoogleKms(key, endpoint(address.options.get("endpoint", _ENDPOINT)))


class GoogleKms:
    scheme = "gcpkms"
    binds = True

    def __init__(self, key: str, origin: str) -> None:
        self._key = key
        self._service = HttpService("Google Cloud KMS", origin)
        self._credentials: Any = None

    def wrap(self, data_key: bytes | bytearray, context: Context) -> bytes:
        said = self._ask("encrypt", {"plaintext": _base64(data_key)}, context)
        return base64.b64decode(said.members["ciphertext"])

    def unwrap(self, wrapped: bytes, context: Context) -> bytearray:
        said = self._ask("decrypt", {"ciphertext": _base64(wrapped)}, context)
        try:
            return bytearray(base64.b64decode(said.members["plaintext"], validate=True))
        except (KeyError, TypeError, binascii.Error) as exc:
            raise WrongWrapping(f"{self._service.name} answered with no data key") from exc

    def close(self) -> None:
        self._service.close()

    def _ask(self, operation: str, body: dict[str, object], context: Context) -> Said:
        body |= {"additionalAuthenticatedData": _base64(context.encode())}
        said = self._service.post(f"/v1/{self._key}:{operation}", body, {"Authorization": f"Bearer {self._token()}"})
        if not said.ok:
            raise self._refused(said, operation)
        return said

    def _refused(self, said: Said, operation: str) -> KeyWithheld | WrongWrapping:
        """A version that is disabled or destroyed: FAILED_PRECONDITION; what does not open: INVALID_ARGUMENT. Both are 400."""
        error = said.members.get("error")
        status = error.get("status") if isinstance(error, dict) else None
        if said.status in (401, 403, 404) or status == "FAILED_PRECONDITION":
            return KeyWithheld(f"{self._service.name} does not {operation} with {self._key} ({status or said.status})")
        return WrongWrapping(f"{self._service.name} does not {operation} this with {self._key}")

    def _token(self) -> str:
        try:
            if self._credentials is None:
                self._credentials, _ = google.auth.default(scopes=[_SCOPE])
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except DefaultCredentialsError:
            raise SettingsError("gcpkms: no credentials: give this process a service account (docs/kms.md)") from None
        except GoogleAuthError as exc:
            raise KmsUnreachable(f"Google gives no access token ({type(exc).__name__})") from None
        return str(self._credentials.token)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()
