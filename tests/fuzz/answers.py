"""Targets of what is said through the seal: a worker's answer at the client, and a client's request at the worker."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Final

import httpx2

from fuzz.statements import MANIFEST, NAMED, NOW, PINNED, POOL_KEY, POOL_SIGNER, ROOT, SIGNER, STATEMENT
from fuzz.target import Script, Target
from fuzz.wire import HEADER, MALFORMED, RESPONSE_SECRET
from lacre import errors
from lacre.asgi import Opened
from lacre.asgi.admission import SealedRefusal
from lacre.chat.attribution import Attribution
from lacre.chat.choices import TextDelta
from lacre.chat.reply import Reply
from lacre.chat.stream import Deltas
from lacre.cli.explain import bar, seen, style
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.evidence.verification import Verification
from lacre.exchange.call import Sealing
from lacre.exchange.request import Plain
from lacre.exchange.resume import ResumableAnswer, asking
from lacre.exchange.sealed_answer import GatewayRefusal
from lacre.exchange.steps import Done, Offload, Outer, Read, Send, Steps, T, Together
from lacre.jose.jws import b64u
from lacre.problems import DATE
from lacre.problems import MEDIA_TYPE as PROBLEM
from lacre.transport.sealed import FACTS
from lacre.trust.manifest import Document
from lacre.trust.manifest_store import VersionMemory
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_RESPONSE, Kem
from lacre.wire.opening import ResponseSealer, open_request
from lacre_backend.node import grant_check
from lacre_fabric.work.grants import Grant
from parts import audited
from parts.bent import cut

OF_AN_ANSWER: Final = (errors.InvalidMessage, errors.InvalidReceipt, errors.ApiError)
OF_A_PEER: Final = (errors.ProtocolError, errors.VerificationError, errors.RefusedError)
DOCUMENT: Final = Document((sign_statement(STATEMENT, ROOT),), sign_manifest(MANIFEST, SIGNER)).encode()
PLAIN: Final = Plain("POST", "/v1/chat/completions", (("content-type", "application/json"),), b'{"model":"tiny","messages":[]}')
GRANT: Final = Grant(
    "r1", NOW, NOW + 60, "default", "tiny", "chat", "pad", 256, 4096, (), ("A" * 22, "B" * 22), b64u(HEADER.digest)
)
STATUSES: Final = (200, 200, 200, 422, 400, 429, 503, 302)
MEDIA_TYPES: Final = (MEDIA_TYPE_RESPONSE, PROBLEM, "text/event-stream", "")
RECEIPT: Final = Receipt(b64u(HEADER.digest), NAMED.digests[0], 12, 4, 3, NOW, NOW + 1, True)
PROOF: Final = AuditProof(b"{}", 0, (), b"")
FACTS_OF_AN_ANSWER: Final = Facts("X25519", "none", 1, 1, Verification(""), RECEIPT, PROOF)

# How a scripted answer is made.
RAW, SEALED_BYTES, SEALED_CUT, SEALED_ANSWER, SEALED_DATE = range(5)


def deltas(data: bytes) -> Deltas:
    """Events of a stream, a line each."""
    reader = Deltas()
    events = [event for line in data.decode("utf-8", "replace").split("\n") for event in reader.feed(line)]
    assert sum(len(event.text) for event in events if isinstance(event, TextDelta)) <= len(data)
    assert "".join(event.text for event in events if isinstance(event, TextDelta) and event.choice == 0) == reader.text
    assert sum(len(choice.text) for choice in reader.choices) <= len(data)
    reader.close(FACTS_OF_AN_ANSWER)
    return reader


def deltas_can_be_counted(data: bytes, reader: Deltas) -> None:
    """And is text where it says so, whatever the worker says in its place."""
    assert len(reader.text) <= len(data)
    assert all(isinstance(value, str) for value in (reader.id, reader.model, reader.finish_reason or ""))
    reader.written.recount(RECEIPT.completion_tokens, len)


def reply(data: bytes) -> Reply:
    """A whole answer; the first byte gives its status."""
    status = (200, 400, 500)[data[0] % 3] if data else 200
    return Reply.parse(httpx2.Response(status, content=data[1:], extensions={FACTS: FACTS_OF_AN_ANSWER}))


def reply_can_be_counted(_data: bytes, answer: Reply) -> None:
    assert all(isinstance(value, str) for value in (answer.id, answer.model, answer.text, answer.finish_reason or ""))
    assert all(isinstance(call.arguments, str) for choice in answer.choices for call in choice.tool_calls)
    answer.recount(len)


def request_inside(data: bytes) -> SealedRefusal | None:
    """What a hostile client seals, up to where the worker would call its app: it may run, or is refused inside the seal."""
    opened = Opened(bhttp.decode_request(data), HEADER, ResponseSealer(HEADER, RESPONSE_SECRET, bytes(32)))
    return grant_check.check(opened, GRANT, NOW)


def refusal_can_be_sealed(_data: bytes, refusal: SealedRefusal | None) -> None:
    if refusal is not None:
        assert 400 <= refusal.status < 500
        json.dumps(refusal.body)


def exchange(data: bytes) -> None:
    """The client's part of an exchange with a gateway, and a worker, that say whatever the script says."""
    script = Script(data)
    client = Sealing(PINNED, VersionMemory(), kems=(Kem.X25519,), shape="none", retries=1, resume=2, clock=lambda: NOW)
    plain = asking(PLAIN)
    opening, pieces = driven(client.exchange(plain), script)
    if isinstance(opening, GatewayRefusal):
        raise opening.problem.exception(opening.retry_after)
    whole = ResumableAnswer(client, plain, opening)
    while not whole.ended:
        try:
            whole.feed(next(pieces, None))
        except errors.LacreError as broken:
            _, pieces = driven(whole.resume(broken), script)
        whole.take()


def driven(steps: Steps[T], script: Script) -> tuple[T, Iterator[bytes]]:
    """What comes of the steps, and what is left of the last answer's body."""
    pieces: Iterator[bytes] = iter(())
    sent: Done = None
    while True:
        try:
            step = steps.send(sent)
        except StopIteration as stop:
            return stop.value, pieces
        match step:
            case Send():
                sent, pieces = answer(step, script)
            case Read():
                sent = next(pieces, None)
            case Offload():
                sent = step.do()
            case Together():
                sent = driven(step.do(), script)[0] if step.wanted() else None
            case _:
                sent = None


def answer(step: Send, script: Script) -> tuple[Outer, Iterator[bytes]]:
    """What the gateway says to one request, and its body in pieces."""
    if not step.sealed:
        return Outer(200), iter([DOCUMENT if script.number() == 0 else script.text()])
    choice, kind, places = script.number(), script.number() % 5, script.cuts()
    proof = audited.proof(audited.entry(dict(step.headers), step.body), SIGNER)
    outer = Outer(STATUSES[choice % 8], MEDIA_TYPES[choice // 8 % 4], None, proof.header())
    content = script.text()
    if kind == RAW:
        return outer, iter(cut(content, places))
    _, header, sealer = open_request({1: POOL_KEY}, step.body)
    body = sealer.seal(made(kind, content, header.digest))
    return outer, iter(cut(body if kind == SEALED_CUT else body + sealer.finish(), places))


def made(kind: int, content: bytes, digest: bytes) -> bytes:
    """The inner answer: as the script has it, or one that is whole and well formed, with a receipt or a date."""
    if kind in (SEALED_BYTES, SEALED_CUT):
        return content
    encoder = bhttp.ResponseEncoder()
    receipt = Receipt(b64u(digest), NAMED.digests[0], 1, 0, 1, NOW, NOW + 1, True).sign(POOL_SIGNER)
    problem = json.dumps({"type": DATE.type}).encode()
    try:
        if kind == SEALED_DATE:
            head = encoder.head(400, (("content-type", PROBLEM), ("date", content.decode("latin-1"))))
        else:
            head = encoder.head(200)
    except errors.UsageError:  # a date that no header can carry
        return b""
    return head + encoder.data(problem if kind == SEALED_DATE else content) + encoder.end(((TRAILER, receipt),))


def explanation(data: bytes) -> Attribution:
    """An explanation of two parts, with a lens where the first byte is odd."""
    response = httpx2.Response(200, content=data[1:], extensions={FACTS: FACTS_OF_AN_ANSWER})
    return Attribution.parse(response, {"a": "Oslo", "b": "Rome"}, lens=data[:1] > b"\x00")


def explanation_can_be_drawn(_data: bytes, told: Attribution) -> None:
    """Every number is one, every part is the caller's, and no lens has a hole."""
    assert [part.id for part in told.parts] == ["a", "b"]
    assert all(map(math.isfinite, [told.logprob, *(part.drop for part in told.parts)]))
    assert all(0 <= part.share <= 1 and bar(part.share) is not None for part in told.parts)
    assert "".join(token.text for token in told.tokens) == told.answer
    assert all(token.bits >= 0 and style(token) is not None for token in told.tokens)
    for token in told.lens.tokens if told.lens is not None else ():
        assert told.lens is not None and len(told.lens.layers) == len(token.ranks)
        seen(told.lens, token)


TARGETS: Final = (
    Target("explanation", explanation, (errors.InvalidMessage, errors.InvalidReceipt), explanation_can_be_drawn, json=True),
    Target("deltas", deltas, (*OF_AN_ANSWER, errors.TruncatedStream), deltas_can_be_counted, json=True),
    Target("reply", reply, OF_AN_ANSWER, reply_can_be_counted, json=True),
    Target("request_inside", request_inside, MALFORMED, refusal_can_be_sealed),
    Target("exchange", exchange, OF_A_PEER, json=True),
)
