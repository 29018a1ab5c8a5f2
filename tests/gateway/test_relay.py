"""The path of a request that is served, and what is left behind of it."""

from __future__ import annotations

import json

import httpx2
import pytest

from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import units
from lacre.jose.jws import raw_public_key
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.relay.relay import rest_of_queue
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker
from parts.issuer import ISSUER
from parts.keys import MODEL
from parts.stage import Stage


@pytest.mark.parametrize(("key", "kem"), [(1, "MLKEM768-X25519"), (2, "X25519")])
async def test_answer(key: int, kem: str, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """It is forwarded byte for byte, and leaves its trail."""
    body, _, opener = stage.seal(key=key)
    response = await stage.post(client, body=body)
    assert (response.status_code, opened(opener, response.content)) == (200, b"".join(PIECES))
    assert response.headers["content-type"] == MEDIA_TYPE_RESPONSE
    assert (response.headers["incremental"], response.headers["x-accel-buffering"]) == ("?1", "no")
    assert "content-length" not in response.headers
    [grant] = worker.grants
    intent, outcome = await stage.trail()
    assert intent["request_id"] == outcome["request_id"] == response.headers["lacre-request-id"] == grant.jti
    assert (intent["subject"], intent["tenant"], intent["issuer"]) == ("alice", "acme", ISSUER)
    assert (intent["pool"], intent["model"], intent["action"], intent["shape"]) == ("default", MODEL, "chat", "none")
    assert (intent["kem"], intent["max_tokens"], intent["sealed_bytes"]) == (kem, 256, len(body))
    assert (intent["decision"], intent["policies"]) == ("allow", ["models-for-everyone"])
    assert (outcome["outcome"], outcome["status"], outcome["unreceipted"]) == ("answered", 200, False)
    assert (outcome["prompt_tokens"], outcome["cached_tokens"], outcome["completion_tokens"]) == (12, 2, 7)
    assert 0 < outcome["duration"] < 10
    assert (stage.gateway.limits.running, stage.hub.inbound) == (0, {})


@pytest.mark.parametrize("size", [20, 5000])
async def test_grant(size: int, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """It says what was asked, and not who asked. The ceiling of a prompt is the model's context at most."""
    body, _, _ = stage.seal(content=b"x" * size)
    await stage.post(client, lacre_shape="pad", lacre_max_tokens="99", body=body)
    [grant] = worker.grants
    assert (grant.pool, grant.model, grant.action, grant.shape) == ("default", MODEL, "chat", "pad")
    assert (grant.max_tokens, grant.max_prompt_tokens) == (99, min(2048, len(body)))
    assert "alice" not in repr(grant) and "acme" not in repr(grant)


async def test_a_grant_takes_turns_by_pseudonyms(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Each request is sealed under another salt, and what the client says of itself changes nothing."""
    for claims in ({}, {}, {"sub": "bob"}, {"tenant": "other"}):
        await stage.post(client, stage.issuer.token(**claims), lacre_fair="x", fair="x")
    alice, again, bob, other = (grant.fair for grant in worker.grants)
    assert alice == again
    assert (alice[0] == bob[0], alice[1] == bob[1]) == (True, False)
    assert not set(other) & {*alice, *bob}


async def test_an_application_s_ceilings_are_of_bytes(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Whatever the context of a model: what is behind `http` may know nothing of tokens."""
    body, _, _ = stage.seal(content=b"x" * 5000)
    token = stage.issuer.token(scope="lacre:http")
    await stage.post(client, token, body=body, lacre_action="http", lacre_max_tokens="99")
    [grant] = worker.grants
    assert (grant.action, grant.max_tokens, grant.max_prompt_tokens) == ("http", 99, units(len(body)))
    intent, outcome = await stage.trail()
    assert intent["reserved_prompt_tokens"] == units(len(body))
    assert outcome["unreceipted"], "the fake worker claims more than that"


async def test_nothing_secret_is_left_behind(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    token = stage.issuer.token()
    body, _, _ = stage.seal(content=b"a canary in the prompt")
    await client.post("/v1/sealed?token=query-canary", content=body, headers=stage.headers(token))
    await stage.post(client, token[:-4], body=body)
    await client.get(f"/{token}", headers={"authorization": f"Bearer {token}"})
    await stage.trail()
    left = stage.log.getvalue() + json.dumps(stage.entries())
    for part in token.split("."):
        assert part not in left
    assert "canary" not in left and "Bearer" not in left
    assert body[7:40].hex() not in left


async def test_answer_proves_that_it_was_recorded(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """The entry is durable, and under the checkpoint that comes with it, before the first byte of the answer."""
    body, _, _ = stage.seal()
    async with client.stream("POST", "/v1/sealed", content=body, headers=stage.headers()) as response:
        proof = AuditProof.parse_header(response.headers["lacre-audit"])
        proof.verify(raw_public_key(stage.keys.gateway))
        assert LogReader(stage.folder / "audit").entry(proof.index) == proof.entry
        await response.aread()
    assert proof.members["enc"] == worker.grants[0].enc
    assert proof.members["request_id"] == response.headers["lacre-request-id"]
    [_, outcome] = await stage.trail()
    assert len(outcome["receipt"]) == 64


async def test_denial_proves_that_it_was_recorded(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, stage.issuer.token(groups=["staff"]), lacre_max_tokens="40000")
    assert response.status_code == 403
    proof = AuditProof.parse_header(response.headers["lacre-audit"])
    proof.verify(raw_public_key(stage.keys.gateway))
    assert (proof.members["decision"], proof.members["groups"]) == ("deny", ["staff"])
    assert (proof.members["reserved_tokens"], proof.members["address"]) == (None, "192.0.2.1")


@pytest.mark.parametrize(("limit", "waited", "rest"), [(30.0, 0.0, 30.0), (10.0, 3.0, 7.0), (10.0, 9.9, 1.0), (0.2, 5.0, 0.2)])
def test_what_was_waited_for_budgets_counts_against_the_queue(limit: float, waited: float, rest: float) -> None:
    assert rest_of_queue(limit, waited) == pytest.approx(rest)
