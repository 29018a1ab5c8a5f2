"""JSON over HTTP to a key management service: what failed on the way, told apart from what the service said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from lacre_fabric.kms.protocol import KmsUnreachable

TIMEOUT: Final = 10.0  # seconds for each step; a worker's start waits for it
_BUSY: Final = frozenset({408, 429})


@dataclass(frozen=True, slots=True)
class Said:
    """A service's answer. members: of its JSON, {} where it was none."""

    status: int
    members: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return self.status < 300


class HttpService:
    """name: what errors call it."""

    def __init__(self, name: str, origin: str) -> None:
        self.name = name
        self._client = httpx2.Client(base_url=origin, timeout=TIMEOUT)

    def post(self, path: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Said:
        """Raises KmsUnreachable: no answer, or one that promises another."""
        try:
            response = self._client.post(path, json=body, headers=dict(headers))
        except httpx2.TransportError as exc:
            raise KmsUnreachable(f"{self.name} does not answer ({type(exc).__name__})") from exc
        if response.status_code >= 500 or response.status_code in _BUSY:
            raise KmsUnreachable(f"{self.name} cannot answer now (HTTP {response.status_code})")
        try:
            members = response.json()
        except ValueError:
            members = {}
        return Said(response.status_code, members if isinstance(members, dict) else {})

    def close(self) -> None:
        self._client.close()
