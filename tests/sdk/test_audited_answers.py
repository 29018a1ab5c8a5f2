"""An answer comes with the proof that it was recorded: kept with the reply, and refused where it is anything else."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre.evidence.audit_proof import AuditProof
from lacre.exchange.call import MANIFEST_PATH
from lacre.jose.jws import raw_public_key
from parts import audited
from parts.relay import AsyncWire, Relay, Wire, served


def test_the_reply_keeps_it(client: lacre.Client, relay: Relay) -> None:
    reply = client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).origin == audited.ORIGIN
    assert reply.audit.members["enc"] == reply.receipt.enc
    assert AuditProof.parse(reply.audit.text()) == reply.audit
    stream = client.chat_stream("Hello.")
    assert "".join(stream) and stream.audit.members["action"] == "chat"
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi."}]})
    assert response.extensions["lacre"].audit.members["enc"] == response.extensions["lacre"].receipt.enc


async def test_the_async_client_too(async_client: lacre.AsyncClient, relay: Relay) -> None:
    reply = await async_client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).size == 1
    relay.audit = lambda _proof: None
    with pytest.raises(lacre.InvalidAudit):
        await async_client.chat("Hello.")


def says(relay: Relay, **changes: Any) -> Callable[[AuditProof], AuditProof]:
    return lambda proof: audited.proof({**proof.members, **changes}, relay.gateway_key)


@pytest.mark.parametrize(
    "changes",
    [
        {"enc": "A" * 43}, {"pool": "other"}, {"model": "larger"}, {"action": "http"}, {"max_tokens": 1}, {"shape": "none"},
        {"kem": "X25519"}, {"sealed_bytes": 7}, {"decision": "deny"}, {"kind": "outcome"},
    ],
)  # fmt: skip
def test_an_entry_of_something_else(client: lacre.Client, relay: Relay, changes: dict[str, Any]) -> None:
    relay.audit = says(relay, **changes)
    name = next(iter(changes))
    with pytest.raises(lacre.InvalidAudit, match="another request" if name == "enc" else f"another {name}") as raised:
        client.chat("Hello.")
    assert ("tell its operator" in str(raised.value)) == (name != "enc")  # connections may be mixed up anywhere


@pytest.mark.parametrize("bend", ["missing", "malformed", "another key", "another entry"])
def test_no_proof(client: lacre.Client, relay: Relay, bend: str) -> None:
    other = Ed25519PrivateKey.generate()
    relay.audit = {
        "missing": lambda _proof: None,
        "malformed": lambda proof: dataclasses.replace(proof, path=(b"short",)),
        "another key": lambda proof: audited.proof(proof.members, other),
        "another entry": lambda proof: dataclasses.replace(proof, entry=json.dumps(proof.members, indent=1).encode()),
    }[bend]
    with pytest.raises(lacre.InvalidAudit):
        client.chat("Hello.")
    with pytest.raises(lacre.VerificationError):
        list(client.chat_stream("Hello."))


def stopped(relay: Relay) -> None:
    """The signer's clock, so that the root's statement stays the very same."""
    now = time.time()
    relay.clock = lambda: now


def manifests(relay: Relay) -> int:
    return sum(request.url.path == MANIFEST_PATH for request in relay.requests)


def test_the_gateways_key_has_changed(client: lacre.Client, relay: Relay) -> None:
    """Nobody is accused: what this side knew was old, and it looks for the new key while the answer waits."""
    stopped(relay)
    client.chat("Hello.")
    relay.gateway_key, relay.version = Ed25519PrivateKey.generate(), 2
    reply = client.chat("Hello.")
    assert (reply.attempts, manifests(relay)) == (1, 2)
    assert reply.audit


def test_another_key_than_the_newest_manifest_names(client: lacre.Client, relay: Relay) -> None:
    client.chat("Hello.")
    relay.gateway_key = Ed25519PrivateKey.generate()
    with pytest.raises(lacre.InvalidAudit, match="does not hold"):
        client.chat("Hello.")
    assert manifests(relay) == 2


def test_no_manifest_to_look_into(client: lacre.Client, relay: Relay) -> None:
    """The call fails; the next one fetches the manifest first."""
    stopped(relay)
    client.chat("Hello.")
    relay.gateway_key, relay.version = Ed25519PrivateKey.generate(), 2
    relay.respond = lambda request: served(404) if request.url.path == MANIFEST_PATH else None
    with pytest.raises(lacre.InvalidAudit) as raised:
        client.chat("Hello.")
    assert raised.value.remedy.startswith("Ask again")
    relay.respond = lambda _request: None
    assert client.chat("Hello.").audit


def jwt_of(claims: dict[str, str]) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize(("claims", "right"), [({"sub": "alice"}, True), ({"sub": "mallory"}, False), ({"iss": "x"}, False)])
def test_the_entry_names_the_tokens_bearer(relay: Relay, claims: dict[str, str], right: bool) -> None:
    with lacre.Client(relay.url, token=jwt_of(claims), memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        if right:
            assert client.chat("Hello.").audit.members["subject"] == "alice"
        else:
            with pytest.raises(lacre.InvalidAudit, match=r"another (subject|issuer)"):
                client.chat("Hello.")


async def test_it_is_checked_before_anything_is_opened(relay: Relay) -> None:
    relay.audit, relay.bend = (lambda _proof: None), (lambda _pieces: [b"never read"])
    async with lacre.AsyncClient(relay.url, token="t", memory=lacre.VersionMemory(), transport=AsyncWire(relay)) as client:
        with pytest.raises(lacre.InvalidAudit):
            await client.chat("Hello.")
