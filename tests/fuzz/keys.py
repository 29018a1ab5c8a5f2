"""Targets of what an issuer publishes: its keys, its metadata, and how it answers. None of it may end in another error."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from fuzz.target import Script, Target
from lacre.errors import SettingsError
from lacre_gateway.auth.fetch import MAX_DOCUMENT, Fetched, FetchFailed, fetch
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.settings import fetchable
from parts.relay import Stream

ALGORITHMS: Final = ("EdDSA", "ES256", "ES384", "ES512", "RS256", "PS512")
URL: Final = "http://127.0.0.1:1/keys"
STATUSES: Final = (200, 200, 200, 304, 301, 404, 500, 204)
FIELDS: Final = ("etag", "cache-control", "age", "content-encoding", "content-length", "location", "content-type", "x")
KIDS: Final[tuple[Any, ...]] = (None, "a", "", 1, [], {}, "\ud800", True)


def jwks(data: bytes) -> KeySet:
    """What was fetched: JSON that may be anything."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise SettingsError("not JSON") from exc
    return KeySet.parse(document, ALGORITHMS, "jwks")


def only_bound_keys_are_found(_data: bytes, keys: KeySet) -> None:
    assert keys <= keys
    for kid in KIDS:
        for algorithm in (*ALGORITHMS, "none", "HS256", None, []):
            found = keys.find(kid, algorithm)
            assert found is None or found.algorithm_name == algorithm


@dataclass(slots=True)
class Issuer(httpx2.AsyncBaseTransport):
    """Answers as the script says. asked: the addresses that were asked."""

    script: Script
    asked: list[str] = field(default_factory=list)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(str(request.url))
        status = STATUSES[self.script.number() % len(STATUSES)]
        named = [FIELDS[self.script.number() % len(FIELDS)] for _ in range(self.script.number() % 4)]
        headers = [(name.encode(), self.script.text()) for name in named]
        pieces = [self.script.text() for _ in range(1 + self.script.number() % 3)]
        return httpx2.Response(status, headers=headers, stream=Stream(pieces))


def issuer(data: bytes) -> Issuer:
    """Metadata, the set that they name, and the set again with the tag that came: each as the script says."""
    answering = Issuer(Script(data))
    asyncio.run(_followed(answering))
    return answering


async def _followed(answering: Issuer) -> None:
    async with httpx2.AsyncClient(transport=answering) as client:
        said: Fetched = await fetch(client, URL, None)
        address = said.value.get("jwks_uri") if isinstance(said.value, dict) else None
        url = address if isinstance(address, str) and fetchable(address, plain=True) else URL
        keys = await fetch(client, url, None)
        await fetch(client, url, keys.etag)


def nobody_else_is_asked(data: bytes, answering: Issuer) -> None:
    assert len(answering.asked) == 3  # no redirect is followed
    assert len(data) <= 4 * MAX_DOCUMENT


def example_set() -> bytes:
    """A key of each kind, public, and always the same."""
    edwards = Ed25519PublicKey.from_public_bytes(
        bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    )
    point = ec.derive_private_key(7, ec.SECP256R1()).public_key()
    modulus = rsa.RSAPublicNumbers(65537, 2**2047 + 1).public_key()
    keys = [
        OKPAlgorithm.to_jwk(edwards, as_dict=True) | {"kid": "a", "use": "sig"},
        ECAlgorithm.to_jwk(point, as_dict=True) | {"kid": "b", "alg": "ES256"},
        RSAAlgorithm.to_jwk(modulus, as_dict=True) | {"kid": "c"},
    ]
    return json.dumps({"keys": keys}, separators=(",", ":")).encode()


TARGETS: Final = (
    Target("jwks", jwks, (SettingsError,), only_bound_keys_are_found, json=True),
    Target("issuer", issuer, (FetchFailed,), nobody_else_is_asked, json=True),
)
