"""The path of a request that is served, what is left behind of it, and what settles it; nobody waits for that."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import threading
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import Receipt, units
from lacre.jose.jws import b64u, raw_public_key
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from lacre_fabric.logs import make_log
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.settlement import AT_ONCE, Claim, ReceiptFault, Settlement, Verdict, judge
from lacre_gateway.relay.relay import rest_of_queue
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.issuer import ISSUER
from parts.keys import MODEL
from parts.stage import Stage
from parts.waiting import until


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


@pytest.mark.usefixtures("worker")
async def test_known_callers_are_told_the_manifests_version(stage: Stage, client: httpx2.AsyncClient) -> None:
    for version in (2, 3):
        await stage.publish(stage.document(version))
        served, denied = await stage.post(client), await stage.post(client, lacre_max_tokens="40000")
        assert (served.status_code, denied.status_code) == (200, 403)
        assert served.headers["lacre-manifest"] == denied.headers["lacre-manifest"] == str(version)
    stranger = await stage.post(client, "no token")
    assert stranger.status_code == 401 and "lacre-manifest" not in stranger.headers


@pytest.mark.parametrize(("limit", "waited", "rest"), [(30.0, 0.0, 30.0), (10.0, 3.0, 7.0), (10.0, 9.9, 1.0), (0.2, 5.0, 0.2)])
def test_what_was_waited_for_budgets_counts_against_the_queue(limit: float, waited: float, rest: float) -> None:
    assert rest_of_queue(limit, waited) == pytest.approx(rest)


# Settlement


KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ENC = b64u(bytes(32))


def receipt(completion: int, *, prompt: int = 5, enc: str = ENC) -> Receipt:
    return Receipt(enc, "sha256:0", prompt, 0, completion, 1.0, 2.0, False)


def token(completion: int, *, key: Ed25519PrivateKey = KEY, **members: Any) -> bytes:
    return receipt(completion, **members).sign(key).encode()


def claim(*tokens: bytes) -> Claim:
    reservation = Reservation(max_prompt_tokens=100, max_tokens=10)
    frames = tuple(Frame("0" * 32, number, FrameKind.BEAT, each) for number, each in enumerate(tokens))
    return Claim("r1", "default", KEY.public_key().public_bytes_raw(), ENC, reservation, frames)


FORGED = token(9, key=OTHER_KEY)
STRANGE = token(9, enc=b64u(b"1" * 32))


@pytest.mark.parametrize(
    ("tokens", "settled", "refused"),
    [
        ((), None, None),
        ((token(1), token(2), token(3)), 3, None),
        ((token(10, prompt=100),), 10, None),
        ((token(11),), None, ReceiptFault.ABOVE_GRANT),
        ((token(1, prompt=101),), None, ReceiptFault.ABOVE_GRANT),
        # The pool's own word above the grant: an older one does not stand in for it.
        ((token(3), token(11)), None, ReceiptFault.ABOVE_GRANT),
        ((token(3), FORGED), 3, ReceiptFault.NOT_THE_POOLS),
        ((token(3), STRANGE), 3, ReceiptFault.OTHER_REQUEST),
        ((token(3), STRANGE, FORGED, b""), 3, ReceiptFault.NOT_THE_POOLS),
        ((FORGED, STRANGE), None, ReceiptFault.OTHER_REQUEST),
        ((b"\xff" * 4000,), None, ReceiptFault.NOT_THE_POOLS),
        ((token(11), FORGED), None, ReceiptFault.ABOVE_GRANT),  # a forged one does not hide it
    ],
)
def test_which_receipt_counts(tokens: tuple[bytes, ...], settled: int | None, refused: ReceiptFault | None) -> None:
    verdict = judge(claim(*tokens))
    assert (verdict.receipt.completion_tokens if verdict.receipt else None, verdict.refused) == (settled, refused)


FORGED_BEAT = receipt(7).sign(OTHER_KEY).encode()


@pytest.mark.parametrize(
    ("beats", "tokens", "refused"),
    [
        (({"completion_tokens": 3}, {"completion_tokens": 5}), 5, None),
        # A beat that proves nothing leaves the one before.
        (({"completion_tokens": 3}, FORGED_BEAT, b"", b"no receipt"), 3, "not-by-the-pool"),
    ],
)
async def test_broken_answer_is_settled_on_the_last_beat(
    beats: tuple[Any, ...], tokens: int, refused: str | None, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    worker.script = Script(beats=beats, ending="error:x")
    await stage.post(client)
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["unreceipted"], outcome["completion_tokens"]) == ("broken", False, tokens)
    assert outcome["refused_receipt"] == refused


async def test_above_the_grant_is_not_settled_at_all(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """The answer is whole, and the client gets it; what the worker wants to be paid for it is refused."""
    worker.script = Script(beats=({"completion_tokens": 3},), usage={"completion_tokens": 257})
    assert await ask(stage, client)
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["unreceipted"], outcome["completion_tokens"]) == ("answered", True, None)
    assert outcome["refused_receipt"] == "above-the-grant"
    [warning] = [entry for entry in stage.logged() if entry["level"] == "warning"]
    assert (warning["event"], warning["reason"]) == ("receipt refused", "above-the-grant")


async def ask(stage: Stage, client: httpx2.AsyncClient) -> bool:
    body, _, opener = stage.seal(key=2)
    response = await stage.post(client, body=body)
    return opened(opener, response.content) == b"".join(PIECES)


async def test_every_answer_is_settled_when_it_has_left(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Whatever the threads of the process do: the verdict needs none."""
    go = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(go.wait)) for _ in range(64)]
    try:
        assert all([await ask(stage, client) for _ in range(5)])
        entries = await stage.trail(5)
    finally:
        go.set()
        await asyncio.gather(*busy)
    assert [entry["unreceipted"] for entry in entries if entry["kind"] == "outcome"] == [False] * 5


class Told:
    """Claims that were settled, by their number, and what was told of each, in its order."""

    def __init__(self) -> None:
        self.settlement = Settlement(make_log(io.StringIO()))
        self.verdicts: dict[int, list[Verdict]] = {}

    def settle(self, number: int, settled: Claim, fails: bool = False) -> None:
        def then(verdict: Verdict) -> None:
            self.verdicts.setdefault(number, []).append(verdict)
            if fails:
                raise ZeroDivisionError

        self.settlement.settle(settled, then)

    def counts(self) -> list[int | None]:
        """The tokens of each verdict, in the order in which they were told."""
        told = [verdict for verdicts in self.verdicts.values() for verdict in verdicts]
        return [verdict.receipt.completion_tokens if verdict.receipt else None for verdict in told]


async def test_a_fault_in_one_claim_costs_no_other_its_verdict(caplog: pytest.LogCaptureFixture) -> None:
    """And they come in the order of the claims."""
    told = Told()
    for number in range(5):
        told.settle(number, claim(token(number + 1)), fails=number == 1)
    broken = dataclasses.replace(claim(token(3)), reservation=None)  # type: ignore[arg-type]  # a fault of ours, say
    told.settle(5, broken)
    await until(lambda: len(told.verdicts) == 6)
    assert told.counts() == [1, 2, 3, 4, 5, None]
    assert told.verdicts[5] == [Verdict(refused=ReceiptFault.NOT_THE_POOLS)]
    assert caplog.messages == ["a try failed: settlement"] * 2


async def test_claims_that_come_together_are_judged_after_their_answers_left_and_a_few_at_a_time() -> None:
    """left: how many claims were judged when each answer's last bytes left. judged: how many after each turn."""
    told, loop, count = Told(), asyncio.get_running_loop(), 2 * AT_ONCE + 1
    left: list[int] = []
    judged = [0]
    for number in range(count):
        loop.call_soon(lambda: left.append(len(told.verdicts)))  # as a transport that gathers the bytes of a turn
        told.settle(number, claim(token(number + 1)))
    while judged[-1] < count:
        await asyncio.sleep(0)
        judged.append(len(told.verdicts))
    assert left == [0] * count
    assert max(after - before for before, after in pairwise(judged)) <= AT_ONCE
    assert list(told.verdicts) == list(range(count))


async def test_no_claim_is_lost_when_the_gateway_closes() -> None:
    told = Told()
    told.settle(0, claim(token(1)))
    told.settle(1, claim(token(2)))
    told.settlement.close()
    assert told.counts() == [1, 2]
    told.settle(2, claim(token(3)))
    assert told.counts() == [1, 2, 3], "its loop may end at any time"
    await asyncio.sleep(0)
    assert told.counts() == [1, 2, 3]
