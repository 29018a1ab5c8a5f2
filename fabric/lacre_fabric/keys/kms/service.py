"""JSON over HTTP to a KMS. Separates transport failures from the service's answers.

Answers are checked before use: another server may be at the service's address.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from lacre.runtime.json_objects import object_in
from lacre.transport.fault_words import fault_in_words
from lacre_fabric.keys.kms.protocol import KmsError, KmsUnreachable

TIMEOUT: Final = 10.0  # seconds for each step; a worker's start waits for it
LONGEST: Final = 30.0  # seconds for a whole answer: one that trickles in passes every step's limit
LARGEST: Final = 64 * 1024  # bytes of an answer; a wrapped key and what surrounds it take about 2 KiB
_BUSY: Final = frozenset({408, 429})
_IDENTITY: Final = {"accept-encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of `service`. members: of its JSON object; {} if there is none."""

    service: str
    status: int
    members: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return self.status < 300

    def text(self, *place: str) -> str:
        """The text at members[place[0]][place[1]] and so on. Raises KmsError."""
        found: object = self.members
        for name in place:
            found = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(found, str):
            raise KmsError(f"{self.service} answered without a key: check its address")
        return found

    def binary(self, *place: str) -> bytes:
        """As `text`, decoded (base64, RFC 4648 section 4)."""
        try:
            return base64.b64decode(self.text(*place), validate=True)
        except binascii.Error as exc:
            raise KmsError(f"{self.service} answered with invalid base64: check its address") from exc


def base64_text(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


class HttpService:
    """An HTTP client for one KMS. name: for error messages."""

    def __init__(self, name: str, origin: str) -> None:
        self.name = name
        self._client = httpx2.Client(base_url=origin, timeout=TIMEOUT)

    def post(self, path: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Said:
        """Raises KmsUnreachable if there is no answer, or if it says to try later."""
        deadline = time.monotonic() + LONGEST
        try:
            with self._client.stream("POST", path, json=body, headers={**headers, **_IDENTITY}) as response:
                if response.status_code >= 500 or response.status_code in _BUSY:
                    raise KmsUnreachable(f"{self.name} cannot answer now (HTTP {response.status_code})")
                content = self._content(response, deadline)
        except httpx2.TransportError as exc:
            raise KmsUnreachable(f"{self.name} does not answer: {fault_in_words(exc)}") from exc
        return Said(self.name, response.status_code, object_in(content) or {})

    def _content(self, response: httpx2.Response, deadline: float) -> bytes:
        """The body, bounded and never decompressed."""
        content = bytearray()
        for piece in response.iter_raw():
            content += piece
            if len(content) > LARGEST:
                raise KmsError(f"{self.name} answered with more than {LARGEST} bytes: check its address")
            if time.monotonic() > deadline:
                raise KmsUnreachable(f"{self.name} took longer than {LONGEST:.0f} s to answer")
        return bytes(content)

    def close(self) -> None:
        self._client.close()
