"""`client.verification` and what errors carry: what was checked, with what, and what had not been checked yet."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lacre
from lacre.errors import LacreError
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import fingerprint
from parts.bent import without
from parts.chat_app import ChatApp
from parts.relay import Relay, connect, on_sealed, served


def test_before_and_after_an_answer(client: lacre.Client, relay: Relay) -> None:
    pinned = b64u(raw_public_key(relay.root))
    assert client.verification == lacre.Verification(pinned)
    reply = client.chat("Name three seas.")
    checked = client.verification
    assert checked.manifest is not None and checked.sealed_to is not None
    assert (checked.pinned, checked.manifest.root) == (pinned, pinned)
    assert checked.manifest.signer == b64u(raw_public_key(relay.signer))
    assert (checked.manifest.issuer, checked.manifest.version) == ("test", 1)
    assert 0 <= checked.manifest.age < 60
    assert checked.sealed_to.key == fingerprint(relay.key.config)
    assert (checked.sealed_to.pool, checked.sealed_to.kem) == ("default", "MLKEM768-X25519")
    assert (checked.receipt, checked.audit) == (reply.receipt, reply.audit)
    assert reply.verification.receipt == reply.receipt
    shown = json.loads(json.dumps(checked.members()))
    assert shown["audit"]["entry"]["pool"] == "default"
    assert shown["receipt"]["completion_tokens"] == 3
    assert "t0ken" not in repr(checked) + str(shown)


async def test_of_a_stream(async_client: lacre.AsyncClient) -> None:
    stream = async_client.chat_stream("Go on.")
    async for _ in stream:
        pass
    assert stream.verification.receipt == stream.receipt
    assert async_client.verification.audit == stream.audit


def test_an_untrusted_manifest(client: lacre.Client, relay: Relay) -> None:
    other = Relay(relay.app)
    relay.respond = lambda request: served(200, other.document())
    with pytest.raises(lacre.UntrustedRoot) as caught:
        client.chat("x")
    assert caught.value.verification == lacre.Verification(b64u(raw_public_key(relay.root)))


BENT: dict[str, dict[str, Any]] = {
    "refused": {"respond": on_sealed(lambda: served(403))},
    "cut": {"bend": without},
    "no receipt": {"receipts": lambda receipt: []},
    "no audit": {"audit": lambda proof: None},
    "the worker's": {},
}


@pytest.mark.parametrize("kind", BENT)
def test_on_errors(kind: str) -> None:
    with connect(Relay(ChatApp(), **BENT[kind])) as client, pytest.raises(LacreError) as caught:
        client.chat([] if kind == "the worker's" else "x")
    checked = caught.value.verification
    assert checked is not None and checked.sealed_to is not None and checked.manifest is not None
    assert (checked.audit is None) == (kind in ("refused", "no audit"))
    assert (checked.receipt is None) == (kind != "the worker's")
    assert caught.value.remedy
