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


async def test_answer_is_forwarded_byte_for_byte(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, opener = stage.seal()
    response = await stage.post(client, body=body)
    assert response.status_code == 200
    assert opened(opener, response.content) == b"".join(PIECES)
    assert response.headers["content-type"] == MEDIA_TYPE_RESPONSE
    assert (response.headers["incremental"], response.headers["x-accel-buffering"]) == ("?1", "no")
    assert "content-length" not in response.headers
    assert len(worker.opened) == 1


async def test_grant_says_what_was_asked_and_not_who(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    await stage.post(client, lacre_shape="pad", lacre_max_tokens="99", body=body)
    [grant] = worker.grants
    assert (grant.pool, grant.model, grant.action, grant.shape) == ("default", MODEL, "chat", "pad")
    assert grant.max_tokens == 99
    assert grant.max_prompt_tokens == min(2048, len(body))
    assert "alice" not in repr(grant) and "acme" not in repr(grant)


async def test_a_grant_says_by_pseudonyms_whose_turn_it_takes(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """Each request is sealed under another salt, and what the client says of itself changes nothing."""
    for token in (
        stage.issuer.token(),
        stage.issuer.token(),
        stage.issuer.token(sub="bob"),
        stage.issuer.token(tenant="other"),
    ):
        await stage.post(client, token, lacre_fair="x", fair="x")
    alice, again, bob, other = (grant.fair for grant in worker.grants)
    assert alice == again
    assert (alice[0] == bob[0], alice[1] == bob[1]) == (True, False)
    assert not set(other) & {*alice, *bob}


async def test_prompt_ceiling_is_the_models_context(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal(content=b"x" * 5000)
    await stage.post(client, body=body)
    assert worker.grants[0].max_prompt_tokens == 2048


async def test_an_application_s_ceilings_are_of_bytes(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Whatever the context of a model: what is behind `http` may know nothing of tokens."""
    body, _, _ = stage.seal(content=b"x" * 5000)
    headers = stage.headers(stage.issuer.token(scope="lacre:http"), lacre_action="http", lacre_max_tokens="99")
    await client.post("/v1/sealed", content=body, headers=headers)
    [grant] = worker.grants
    assert (grant.action, grant.max_tokens, grant.max_prompt_tokens) == ("http", 99, units(len(body)))
    intent, outcome = await stage.trail()
    assert intent["reserved_prompt_tokens"] == units(len(body))
    assert outcome["unreceipted"], "the fake worker claims more than that"


async def test_trail_of_an_answer(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    response = await stage.post(client, body=body)
    intent, outcome = await stage.trail()
    assert intent["request_id"] == outcome["request_id"] == response.headers["lacre-request-id"] == worker.grants[0].jti
    assert (intent["subject"], intent["tenant"], intent["issuer"]) == ("alice", "acme", ISSUER)
    assert (intent["pool"], intent["model"], intent["action"], intent["shape"]) == ("default", MODEL, "chat", "none")
    assert (intent["kem"], intent["max_tokens"], intent["sealed_bytes"]) == ("MLKEM768-X25519", 256, len(body))
    assert (intent["decision"], intent["policies"]) == ("allow", ["models-for-everyone"])
    assert (outcome["outcome"], outcome["status"], outcome["unreceipted"]) == ("answered", 200, False)
    assert (outcome["prompt_tokens"], outcome["cached_tokens"], outcome["completion_tokens"]) == (12, 2, 7)
    assert 0 < outcome["duration"] < 10


async def test_x25519_is_taken_too(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, opener = stage.seal(key=2)
    response = await stage.post(client, body=body)
    assert opened(opener, response.content) == b"".join(PIECES)
    assert (await stage.trail())[0]["kem"] == "X25519"


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


async def test_streams_are_counted_down_again(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    for _ in range(3):
        await stage.post(client)
    assert stage.gateway.limits.running == 0
    assert stage.hub.inbound == {}


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
    headers = stage.headers(stage.issuer.token(groups=["staff"]), lacre_max_tokens="40000")
    response = await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)
    assert response.status_code == 403
    proof = AuditProof.parse_header(response.headers["lacre-audit"])
    proof.verify(raw_public_key(stage.keys.gateway))
    assert (proof.members["decision"], proof.members["groups"]) == ("deny", ["staff"])
    assert (proof.members["reserved_tokens"], proof.members["address"]) == (None, "192.0.2.1")


@pytest.mark.parametrize(("limit", "waited", "rest"), [(30.0, 0.0, 30.0), (10.0, 3.0, 7.0), (10.0, 9.9, 1.0), (0.2, 5.0, 0.2)])
def test_what_was_waited_for_budgets_counts_against_the_queue(limit: float, waited: float, rest: float) -> None:
    assert rest_of_queue(limit, waited) == pytest.approx(rest)
