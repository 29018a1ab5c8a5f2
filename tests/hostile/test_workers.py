"""A worker that lies: to the gateway that bills by its receipts, and to the caller who pays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner, HostileFabric, HttpWire
from hostile.attacks import NOTHING, Verdict, attack
from hostile.shapes import Test
from lacre import ApiError, problems
from lacre.errors import InvalidMessage, InvalidReceipt, WrongModel
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime import tasks
from lacre.trust.manifest import MAX_OUTPUT, ModelEntry
from lacre.wire import bhttp
from lacre.wire.header import SealedHeader
from lacre.wire.opening import open_request
from lacre_backend.node.opened_keys import OpenedKeys
from lacre_fabric.work.frames import FrameKind
from parts.keys import MODEL, POOL
from parts.memory_fabric import MemoryDelivery
from parts.stage import Stage

TEXT = "One, two, three."
APPROVED, OTHER = "1" * 64, "2" * 64  # model files' SHA-256
TOKENS = 16

Headers = tuple[tuple[str, str], ...]


@dataclass
class LyingWorker:
    """trailers: what it makes of the trailers that hold its honest receipt. told: members of the receipt that the gateway gets,
    told_by: what signs that one. usage: what the answer itself says. status, headers: of its answer.
    """  # fmt: skip

    stage: Stage
    trailers: Callable[[Headers, Receipt], Headers] = lambda honest, _receipt: honest
    told: dict[str, Any] = field(default_factory=dict)
    told_by: Ed25519PrivateKey | None = None
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 9, "completion_tokens": TOKENS})
    text: str = TEXT
    status: int = 200
    headers: Headers = (("content-type", "application/json"),)
    body: bytes | None = None
    opened: list[bytes] = field(default_factory=list)

    async def __aenter__(self) -> LyingWorker:
        self._fabric = self.stage.hub.worker(POOL, [MODEL])
        self._running = tasks.spawn("lying", self._run())
        return self

    async def __aexit__(self, *_error: object) -> None:
        await tasks.end(self._running)
        await self._fabric.close()

    async def _run(self) -> None:
        while True:
            delivery = await self._fabric.pull()
            await self._answer(delivery)
            self._fabric.release()

    async def _answer(self, delivery: MemoryDelivery) -> None:
        plaintext, header, sealer = open_request(self.stage.held, delivery.work.sealed)
        self.opened.append(plaintext)
        honest = self.receipt(header)
        encoder = bhttp.ResponseEncoder()
        answer = encoder.head(self.status, self.headers) + encoder.data(self.body or self._chat())
        answer += encoder.end(self.trailers(((TRAILER, self.sign(honest)),), honest))
        await delivery.send(FrameKind.DATA, sealer.finish(answer))
        told = self.receipt(header, **self.told).sign(self.told_by or self.stage.keys.receipts).encode()
        work = delivery.work
        key = OpenedKeys(POOL).find(work.settlement, work.gateway, header.key_id, self.stage.held)
        await delivery.send(FrameKind.USAGE, told, b"" if key is None else key.mac(told))
        await delivery.drop()
        self.stage.hub.eyes.outcomes.append((delivery.work.request_id, "answered"))

    def receipt(self, header: SealedHeader, **members: Any) -> Receipt:
        now = time.time()
        return replace(Receipt(b64u(header.digest), "sha256:00", 9, 0, TOKENS, now, now, final=True), **members)

    def sign(self, receipt: Receipt) -> str:
        return receipt.sign(self.stage.keys.receipts)

    def _chat(self) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
        return json.dumps({"id": "c1", "model": MODEL, "choices": [choice], "usage": self.usage}).encode()


OF_THE_POOL = "the caller accepts one final receipt by the pool's key, which must name this request and keep its token ceiling"


def resigned(stage: Stage, **members: Any) -> Callable[[Headers, Receipt], Headers]:
    return lambda _honest, receipt: ((TRAILER, replace(receipt, **members).sign(stage.keys.receipts)),)


def lied(name: str, defence: str, *lies: Callable[[Stage], Any], **worker: Any) -> Test:
    """The attack of a worker whose answer has such trailers. worker: as of `LyingWorker`."""

    @attack(name, "worker", defence, InvalidReceipt, cases=lies, ids=range(len(lies)))
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: Any) -> None:
        async with LyingWorker(stage, case(stage), **worker):
            with verdict.refused():
                await stage.client(gateway).chat(stage.prompt)

    return test


test_none_or_two = lied("send the caller no receipt, or two", OF_THE_POOL,
    *(lambda _stage, number=number: lambda honest, _receipt: honest * number for number in (0, 2)))  # fmt: skip
test_own_key = lied("sign a receipt with a key that is not the pool's", OF_THE_POOL,
    lambda _stage: lambda _honest, receipt: ((TRAILER, receipt.sign(Ed25519PrivateKey.generate())),))  # fmt: skip
test_another_request = lied("send the receipt of another request", OF_THE_POOL, lambda stage: resigned(stage, enc="A" * 43))
test_not_final = lied("send a receipt that is not final", OF_THE_POOL, lambda stage: resigned(stage, final=False))
test_above = lied("claim more tokens than the caller asked for", OF_THE_POOL,
    lambda stage: resigned(stage, completion_tokens=MAX_OUTPUT + 1),
    usage={"prompt_tokens": 9, "completion_tokens": MAX_OUTPUT + 1})  # fmt: skip
test_other_than_told = lied(
    "claim a different token count in the receipt than in the answer",
    "the caller compares the receipt with the answer's `usage`",
    *(lambda stage, claimed=claimed: resigned(stage, completion_tokens=claimed) for claimed in (TOKENS - 1, TOKENS + 1, 512)),
)  # fmt: skip


def misweighted(name: str, *cases: tuple[tuple[str, ...], str | None, str]) -> Test:
    """The attack of a worker that serves other weights. cases: the digests in the manifest, the caller's pin, and the `model`
    of the receipt.
    """

    @attack(name, "worker", "a receipt names the file, and the caller accepts only those that manifest and pin name",
            WrongModel, cases=cases, ids=range(len(cases)))  # fmt: skip
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: Any) -> None:
        named, pinned, says = case
        stage.named[MODEL] = ModelEntry(named)
        stage.bucket = stage.document()
        options = {} if pinned is None else {"pin_models": {MODEL: f"sha256:{pinned}"}}
        async with LyingWorker(stage, resigned(stage, model=says)):
            with verdict.refused():
                await stage.client(gateway, **options).chat(stage.prompt)

    return test


test_other_weights = misweighted("serve other weights than those that the manifest names",
    ((APPROVED,), None, f"sha256:{OTHER}"), ((APPROVED,), None, ""), ((APPROVED,), None, APPROVED),
    ((APPROVED, "3" * 64), None, f"sha256:{OTHER}"))  # fmt: skip
test_other_than_pinned = misweighted("serve other weights than those that the caller pinned",
    ((), APPROVED, f"sha256:{OTHER}"), ((), APPROVED, ""), ((APPROVED, OTHER), APPROVED, f"sha256:{OTHER}"))  # fmt: skip


@attack("serve other weights, and sign a receipt that names the right ones", "worker",
        "nothing at once: the digest is the pool's word", gain="an answer by other weights, under a false receipt that its "
        "pool signed")  # fmt: skip
async def test_false_weights(stage: Stage, gateway: GatewayOwner) -> None:
    stage.named[MODEL] = ModelEntry((APPROVED,))
    stage.bucket = stage.document()
    async with LyingWorker(stage, resigned(stage, model=f"sha256:{APPROVED}")):
        reply = await stage.client(gateway).chat(stage.prompt)
    assert (reply.text, reply.receipt.model) == (TEXT, f"sha256:{APPROVED}")


TWO_PARTS = {"a": "Oslo", "b": "Rome"}
TOLD = {
    "id": "e1", "model": MODEL, "answer": "Oslo", "logprob": -1.5, "usage": {"prompt_tokens": 9, "completion_tokens": TOKENS},
    "parts": [{"id": "a", "drop": 8.0, "share": 1.0}, {"id": "b", "drop": -0.5, "share": 0.0}],
    "tokens": [{"text": "Os", "bits": 1.5}, {"text": "lo", "bits": 0.0}],
    "lens": {"layers": [0, 5],
             "tokens": [{"text": "Os", "ranks": [9, 1], "probabilities": [0.1, 0.9], "says": ["x", "Os"]}]},
}  # fmt: skip


def of_parts(*parts: tuple[str, Any, Any]) -> dict[str, Any]:
    return {"parts": [{"id": name, "drop": drop, "share": share} for name, drop, share in parts]}


def of_lens(**members: Any) -> dict[str, Any]:
    token = {"text": "Os", "ranks": [9, 1], "probabilities": [0.1, 0.9], "says": ["x", "Os"]}
    return {"lens": {"layers": members.pop("layers", [0, 5]), "tokens": [token | members]}}


@attack("explain parts that nobody sent, or by numbers that are none", "worker",
        "the caller accepts a drop for each of its own parts, finite numbers, and tokens that spell the answer",
        InvalidMessage, cases=[
            of_parts(("a", 8.0, 1.0)), of_parts(("b", 8.0, 1.0), ("a", 0.0, 0.0)), of_parts(("a", 8.0, 1.0), ("x", 0.0, 0.0)),
            of_parts(("a", 8.0, 1.0), ("a", 0.0, 0.0), ("b", 0.0, 0.0)), of_parts(("a", 8.0, 1.5), ("b", 0.0, 0.0)),
            of_parts(("a", "8", 1.0), ("b", 0.0, 0.0)), of_parts(("a", True, 1.0), ("b", 0.0, 0.0)),
            of_parts(("a", float("nan"), 1.0), ("b", 0.0, 0.0)), of_parts(("a", 10**400, 1.0), ("b", 0.0, 0.0)),
            {"logprob": float("inf")}, {"logprob": None}, {"answer": "Rome"}, {"tokens": []}, {"parts": {}}, {"lens": None},
            {"tokens": [{"text": "Oslo", "bits": -1.0}]}, of_lens(layers=[5, 0]), of_lens(layers=[0]), of_lens(layers=[0, 0]),
            of_lens(ranks=[0, 1]), of_lens(ranks=[1.5, 1]), of_lens(says=["x"]), of_lens(probabilities=[2, 0.9]),
        ], ids=range(23))  # fmt: skip
async def test_explanations(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: dict[str, Any]) -> None:
    body = json.dumps(TOLD | case).replace("Infinity", "1e999")  # a number that readers of JSON take for infinite
    async with LyingWorker(stage, body=body.encode()):
        with verdict.refused():
            await stage.client(gateway).explain(stage.prompt, parts=TWO_PARTS, lens=True)


@attack("explain an answer by numbers of its own invention", "worker", "nothing: no one else computed them",
        gain="an explanation that is false, under the pool's receipt")  # fmt: skip
async def test_false_explanation(stage: Stage, gateway: GatewayOwner) -> None:
    async with LyingWorker(stage, body=json.dumps(TOLD).encode()):
        told = await stage.client(gateway).explain(stage.prompt, parts=TWO_PARTS, lens=True)
    assert told.top is not None and (told.top.id, told.answer) == ("a", "Oslo")


@attack("claim tokens that it did not make, in the receipt and in the answer alike", "worker",
        "nothing at once: a receipt attributes the count but does not prove it",
        gain="a bill up to the reservation; `reply.recount()` shows tokens without text")  # fmt: skip
async def test_overcount(stage: Stage, gateway: GatewayOwner) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 500}
    async with LyingWorker(stage, resigned(stage, completion_tokens=500), usage=usage):
        reply = await stage.client(gateway).chat(stage.prompt)
    assert (reply.receipt.completion_tokens, reply.recount().unexplained) == (500, 500 - TOKENS)


@attack("bill the gateway for more than was granted", "worker", "receipts are bounded by the reservation",
        gain="nothing; the request is booked as `unreceipted`",
        cases=[{"completion_tokens": MAX_OUTPUT + 1}, {"prompt_tokens": 10**6}])  # fmt: skip
async def test_bill_above(stage: Stage, honest: Stage, wire: HttpWire, case: dict[str, int]) -> None:
    async with LyingWorker(stage, told=case):
        await stage.client(wire, honest.token).chat(stage.prompt)
    (outcome,) = await honest.outcomes()
    assert (outcome["unreceipted"], outcome["completion_tokens"]) == (True, None)


@attack("tell the gateway another count than the caller", "worker", "nothing at once: gateway and caller can compare",
        gain="a bill up to the reservation, and two receipts by the pool's key that contradict each other")  # fmt: skip
async def test_two_stories(stage: Stage, honest: Stage, wire: HttpWire) -> None:
    async with LyingWorker(stage, told={"completion_tokens": 500}):
        reply = await stage.client(wire, honest.token).chat(stage.prompt)
    (outcome,) = await honest.outcomes()
    assert (reply.receipt.completion_tokens, outcome["completion_tokens"]) == (TOKENS, 500)


@attack("look for the caller's name in opened requests", "worker",
        "inner headers by allow-list, identifying fields dropped, grants without a name",
        gain="the prompt, which it must read; no name")  # fmt: skip
async def test_who(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    client = stage.client(wire, honest.token)
    names = ("authorization", "cookie", "user-agent", "x-stainless-os", "traceparent", "baggage", "forwarded", "x-request-id")
    about = {"user": "jocelyn", "metadata": {"name": "jocelyn"}, "safety_identifier": "jocelyn", "prompt_cache_key": "jocelyn"}
    body = {"messages": [{"role": "user", "content": stage.prompt}], **about}
    async with LyingWorker(stage) as worker:
        headers = dict.fromkeys(names, "jocelyn")
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
    everything = (worker.opened[0] + b64u_decode(fabric.works[0].grant.split(".")[1])).lower()
    assert stage.canary.encode() in everything
    for secret in ("jocelyn", "alice", "acme", honest.token.lower(), "lacre/", "192.0.2.1"):
        assert secret.encode() not in everything


def misdated(name: str, defence: str, *dates: str, opened: int, gain: str = NOTHING) -> Test:
    """The attack of a worker that says that the caller's clock is wrong, at these dates. opened: requests that it then had."""

    @attack(name, "worker", defence, ApiError, code=problems.DATE.type, gain=gain, cases=dates, ids=range(len(dates)))
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: str) -> None:
        headers = (("content-type", problems.MEDIA_TYPE), ("date", case))
        async with LyingWorker(stage, status=400, headers=headers, body=problems.DATE.body()) as worker:
            with verdict.refused():
                await stage.client(gateway).chat(stage.prompt)
        assert len(worker.opened) == opened

    return test


test_clock = misdated("mark a caller by a false clock",
    "one correction a request, 30 days at most, forgotten with the hour's salt", formatdate(4e9, usegmt=True),
    "Mon, 01 Jan 99999999999999 00:00:00 GMT", "yesterday", opened=1)  # fmt: skip
test_clock_again = misdated("have the caller correct its clock again and again", "one correction a request",
    formatdate(None, usegmt=True), opened=2, gain="one more run of its own request, counted in `attempts`")  # fmt: skip
