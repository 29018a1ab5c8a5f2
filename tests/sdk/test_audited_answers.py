"""An answer comes with the proof that it was recorded: kept with the reply, and refused where it is anything else."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import raw_public_key
from parts import audited
from parts.relay import MANIFEST, Relay, connect, served

OTHER = Ed25519PrivateKey.generate()


def test_the_reply_keeps_it(client: lacre.Client, relay: Relay) -> None:
    reply = client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).origin == audited.ORIGIN
    assert reply.audit.members["enc"] == reply.receipt.enc
    assert AuditProof.parse(reply.audit.text()) == reply.audit
    stream = client.chat_stream("Hello.")
    assert "".join(stream) and stream.audit.members["action"] == "chat"
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi."}]})
    assert response.extensions["lacre"].audit.members["enc"] == response.extensions["lacre"].receipt.enc


async def test_the_async_client_checks_it_before_anything_is_opened(async_client: lacre.AsyncClient, relay: Relay) -> None:
    reply = await async_client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).size == 1
    relay.audit, relay.bend = (lambda _proof: None), (lambda _pieces: [b"never read"])
    with pytest.raises(lacre.InvalidAudit):
        await async_client.chat("Hello.")


@pytest.mark.parametrize(
    "changes",
    [
        {"enc": "A" * 43}, {"pool": "other"}, {"model": "larger"}, {"action": "http"}, {"max_tokens": 1}, {"shape": "none"},
        {"kem": "X25519"}, {"sealed_bytes": 7}, {"decision": "deny"}, {"kind": "outcome"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_something_else(client: lacre.Client, relay: Relay, changes: dict[str, Any]) -> None:
    relay.audit = lambda proof: audited.proof({**proof.members, **changes}, relay.gateway_key)
    [name] = changes
    with pytest.raises(lacre.InvalidAudit, match="another request" if name == "enc" else f"another {name}") as raised:
        client.chat("Hello.")
    assert ("tell its operator" in str(raised.value)) == (name != "enc")  # connections may be mixed up anywhere


@pytest.mark.parametrize(
    "bend",
    [
        lambda _proof: None,
        lambda proof: dataclasses.replace(proof, path=(b"short",)),
        lambda proof: audited.proof(proof.members, OTHER),
        lambda proof: dataclasses.replace(proof, entry=json.dumps(proof.members, indent=1).encode()),
    ],
    ids=["missing", "malformed", "another key", "another entry"],
)
def test_no_proof(client: lacre.Client, relay: Relay, bend: Any) -> None:
    relay.audit = bend
    for ask in (client.chat, lambda question: list(client.chat_stream(question))):
        with pytest.raises(lacre.InvalidAudit):
            ask("Hello.")


class TestTheGatewaysKeyHasChanged:
    """Nobody is accused: what this side knew was old, and it looks for the new key while the answer waits."""

    @pytest.fixture(autouse=True)
    def changed(self, client: lacre.Client, relay: Relay) -> None:
        now = time.time()
        relay.clock = lambda: now  # the signer's, so that the root's statement stays the very same
        client.chat("Hello.")
        relay.gateway_key, relay.version = OTHER, 2

    def test_and_the_manifest_says_so(self, client: lacre.Client, relay: Relay) -> None:
        reply = client.chat("Hello.")
        assert (reply.attempts, relay.manifests) == (1, 2)
        assert reply.audit

    def test_but_the_newest_manifest_names_another(self, client: lacre.Client, relay: Relay) -> None:
        relay.version = 1
        with pytest.raises(lacre.InvalidAudit, match="does not hold"):
            client.chat("Hello.")
        assert relay.manifests == 2

    def test_and_there_is_no_manifest_to_look_into(self, client: lacre.Client, relay: Relay) -> None:
        """The call fails; the next one fetches the manifest first."""
        relay.respond = lambda request: served(404) if request.url.path == MANIFEST else None
        with pytest.raises(lacre.InvalidAudit) as raised:
            client.chat("Hello.")
        assert raised.value.remedy.startswith("Ask again")
        relay.respond = lambda _request: None
        assert client.chat("Hello.").audit


@pytest.mark.parametrize(("claims", "other"), [({"sub": "alice"}, ""), ({"sub": "bob"}, "subject"), ({"iss": "x"}, "issuer")])
def test_the_entry_names_the_tokens_bearer(relay: Relay, claims: dict[str, str], other: str) -> None:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    with connect(relay, token=f"e30.{payload}.c2ln") as client:
        if other:
            with pytest.raises(lacre.InvalidAudit, match=f"another {other}"):
                client.chat("Hello.")
        else:
            assert client.chat("Hello.").audit.members["subject"] == "alice"
