"""A malicious caller: requests that ask for what they may not, and messages and seals that are none."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Any, Final

import pytest

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import FORM, Test, by_hand, chat, part, told, unread
from lacre import ApiError, problems
from lacre.asgi import Receive, Scope, Send
from lacre.errors import TruncatedStream, UsageError
from lacre.wire.bhttp import MAX_REQUEST_PIECES, encode_request, encode_request_indeterminate
from lacre.wire.fields import MAX_FIELDS
from lacre.wire.header import MAX_REQUEST_CHUNKS, Aead, Kdf, Kem
from lacre.wire.ohttp import RequestSealer, seal_request
from lacre.wire.opening import PrivateKey
from parts.keys import MODEL, OTHER_MODEL
from parts.stage import Stage

INSIDE = "the worker compares the inside with the grant"
MISMATCH = "grant_mismatch"


def sent(content: bytes | None = None, more: tuple[tuple[str, str], ...] = (), **parts: Any) -> Callable[[Stage], bytes]:
    """A well-formed request, with these parts. content: in place of an honest chat. more: headers beside the usual."""

    def message(stage: Stage) -> bytes:
        headers = {"headers": (*inner().headers, *more)} if more else {}
        return encode_request(inner(chat(stage) if content is None else content, **headers, **parts))

    return message


def asking(**members: Any) -> Callable[[Stage], bytes]:
    return lambda stage: encode_request(inner(chat(stage, **members)))


def explained(parts: int, **members: Any) -> bytes:
    """An explanation of an answer that rests on so many parts."""
    content = [{"type": "text", "id": str(i), "text": "a part of the prompt"} for i in range(parts)]
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}], "answer": "a", **members}).encode()


def showing(address: str) -> Callable[[Stage], bytes]:
    return asking(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}])


# A head of a PNG file: 65,535 pixels a side, which take 16 GiB
_HUGE: Final = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + 2 * b"\0\0\xff\xff" + b"\x08\x06\0\0\0").decode()

test_an_address = told("have the worker fetch an address of its network, as a picture", "media come inside the request",
    "unsupported_value", *map(showing, ("http://169.254.169.254/latest", "file:///etc/passwd", "//db.internal/")),
    calls=1)  # fmt: skip
test_a_huge_picture = told("send a small file that claims the memory of a huge picture",
    "a picture's size is read from its head, before it is decoded", "image_too_large",
    showing(f"data:image/png;base64,{_HUGE}"), calls=1)  # fmt: skip
test_path_traversal = told(
    "leave the path by dot segments, plain or escaped", "a path in its normal form only", "invalid_path",
    *(sent(b"{}", path=path) for path in (
        "/../etc/passwd", "/v1/./models", "/v1/%2e%2e/admin", "/v1/..%2fadmin", "//evil.example/v1", "/v1/models%00.html",
        "/..", "/v1/%0d%0a")),
    action="http",
)  # fmt: skip
test_escaped_path = told("reach the chat by an escaped path, under a grant for another action",
    "the path is compared as the app will read it", MISMATCH,
    *(sent(path=path) for path in ("/v1/%63hat/completions", "/v1/chat%2Fcompletions", "/v1/chat/completions?x=1")),
    action="http")  # fmt: skip
test_authority = told("name an authority other than ours", "a sealed request is for the pool, and for no host", MISMATCH,
    *(sent(authority=name) for name in ("169.254.169.254", "", "lacre.invalid:22")), sent(scheme="http"))  # fmt: skip
test_connect = unread(
    "tunnel through the worker", FORM,
    *(lambda _stage, control=control: b"\x00" + b"".join(map(part, control.split(b"|"))) + b"\x00\x00\x00"
      for control in (b"CONNECT|https|db.internal:5432|/", b"GET /|https|x|/", b"GET|https|user@x|/")),
)  # fmt: skip
test_another_model = told("ask for another model inside than was granted", INSIDE, MISMATCH, asking(model=OTHER_MODEL), calls=1)
test_a_lens = told("ask what each layer would say, under a grant for an explanation alone", INSIDE, MISMATCH,
    sent(explained(1, lens=True), path="/v1/explain"), calls=1, action="explain")  # fmt: skip
test_no_lens = told("ask for another action than the layers that were granted", INSIDE, MISMATCH,
    sent(explained(1), path="/v1/explain"), sent(explained(1, lens=False), path="/v1/explain"), calls=1,
    action="lens")  # fmt: skip
test_a_lens_elsewhere = told("chat under a grant for the layers", INSIDE, MISMATCH, asking(lens=True), action="lens")
test_more_parts = told("compute a prompt anew without each of many parts, beyond the reservation", INSIDE, MISMATCH,
    sent(explained(16), path="/v1/explain"), calls=1, action="explain", max_prompt_tokens=400)  # fmt: skip
test_more_prompt = told(
    "send more prompt than the reservation covers", INSIDE, MISMATCH, asking(), calls=1, max_prompt_tokens=10
)


@attack("ask for more tokens inside than were granted", "client", INSIDE, ApiError, code=MISMATCH,
        cases=[{"max_tokens": 513}, {"max_completion_tokens": 100_000}, {"max_tokens": 300, "n": 2}, {"n": 16}])  # fmt: skip
async def test_more_tokens(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: dict[str, int]) -> None:
    """Without the copies of the outer headers, which may be left out."""
    worker = await stage.worker()
    answer = await gateway.submit(asking(**case)(stage), max_tokens=512 if case != {"n": 16} else 8)
    verdict.answered(answer.status, answer.code)
    assert worker.calls == 1


TODAY: Final = formatdate(None, usegmt=True)
test_dates = told(
    "seal a request without a date, with two, or with an invalid one", "a request without one good date is not run",
    problems.DATE.type,
    *(sent(headers=tuple(("date", date) for date in dates)) for dates in (
        (), ("now",), (formatdate(time.time() - 301, usegmt=True),), (TODAY,) * 2,
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT",), ("Mon, 01 Jan 2024 99999999999:00:00 GMT",))),
)  # fmt: skip


# What the app reads


read: Final = partial(told, calls=1)
test_nesting = read("nest JSON a hundred thousand deep", "the API's parser has a depth", "None",
    *map(sent, (b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}")))  # fmt: skip
test_many_values = read(
    "send JSON of millions of values, to delay all other answers", "a limit on values", "request_too_large",
    *(sent(b"{%b}" % member) for member in (
        b'"stop":[' + b'"",' * 300_000 + b'""]', b",".join(b'"%x":1' % number for number in range(100_000)))),
)  # fmt: skip
test_bomb = read("send a decompression bomb", "nothing inside the seal is inflated", "None",
    sent(gzip.compress(b'{"messages":[' + b" " * 50_000_000), (("content-encoding", "gzip"),)))  # fmt: skip
test_salts = read("share another caller's prefix cache by sending two salts, or an endless one",
    "one salt of at most 256 bytes, which no other caller knows", "None",
    *(sent(more=tuple(("lacre-cache-salt", salt) for salt in salts)) for salts in (("a", "b"), ("a" * 257,))))  # fmt: skip


@attack("make the app fail, and read the prompt in the worker's log", "gateway",
        "logs name places in the code, never an exception's text; a broken answer has no final chunk", TruncatedStream,
        cases=["raises", "returns", "answers twice"])  # fmt: skip
async def test_log(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: str) -> None:
    async def failing(_scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        done = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({**done, "body": done["body"] * 9, "more_body": True})
        if case == "raises":
            raise ValueError(body)
        if case == "answers twice":
            await send(done)
            await send({**done, "body": body})

    await stage.worker(failing)
    with verdict.refused():
        [piece async for piece in stage.client(gateway).chat_stream(stage.prompt)]
    assert "app.failed" in gateway.eyes.log.getvalue()


@attack("send no token to a service that forwards its callers' tokens, so that it answers as itself", "client",
        "only None means absent: an empty token is refused, and the environment's token does not replace it", UsageError,
        cases=["", " ", "\r\n", lambda: "", lambda: " "])  # fmt: skip
async def test_no_token_to_pass_on(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    monkeypatch.setenv("LACRE_TOKEN", "of-the-service")
    with verdict.refused():
        await stage.client(gateway, token=case).chat(stage.prompt)


# The form of what is sealed


def written(*headers: tuple[bytes, bytes], **parts: bytes) -> Callable[[Stage], bytes]:
    return lambda _stage: by_hand(*headers, **parts)


test_content_length = unread(
    "lie about the length of the content", FORM,
    *(written((b"content-length", length)) for length in (b"1", b"3", b"99999999999999", b"+2", b"2, 3", b"0x2", b"9" * 20)),
)  # fmt: skip
test_two_lengths = unread("give two lengths of the content", FORM,
    *(written((b"content-length", b"2"), (b"content-length", b"%d" % other)) for other in range(3, 20)))  # fmt: skip
test_transfer_coding = unread(
    "smuggle a second request by a transfer coding", FORM,
    *(written(header, content=b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n")
      for header in ((b"transfer-encoding", b"chunked"), (b"connection", b"upgrade"), (b"te", b"gzip"))),
)  # fmt: skip
test_header_splitting = unread("split a header by line breaks, or name one in capitals or like a pseudo-field", FORM,
    written((b"x", b"a\r\nhost: evil")), written((b"x\ny", b"a")), written((b"x", b"\x00")), written((b"Date", b"a")),
    written((b":path", b"/admin")), written((b"", b"a")))  # fmt: skip
test_header_flood = unread("flood the worker with headers", "limits on fields and on their sections",
    written(*[(b"x", b"a")] * MAX_FIELDS), written(*[(b"x", b"a" * 16384)] * 5), written((b"x", b"a" * 16385)),
    written((b"x" * 257, b"a")))  # fmt: skip
test_huge_part = unread(
    "announce a part of the message of 2^62 - 1 bytes", "a length is checked before anything is buffered",
    *(lambda _stage, before=before: b"\x00" + before + b"\xff" * 8
      for before in (b"", b"\x04POST", b"\x04POST\x05https\x0dlacre.invalid\x01/")),
)  # fmt: skip
test_cut_inside = unread("end the message in the middle of a part, inside a complete seal", FORM,
    *(lambda _stage, kept=kept: encode_request(inner(b"0123456789"))[:kept] for kept in (0, 1, 9, 40, -3)))  # fmt: skip
test_after_the_end = unread("put a second message after the first", FORM, lambda _stage: encode_request(inner()) * 2)
test_framing = unread("seal a response in place of a request", FORM,
    *(lambda _stage, framing=framing: bytes([framing]) + encode_request(inner())[1:] for framing in (1, 3, 4, 63)))  # fmt: skip


def in_pieces(pieces: bytes) -> bytes:
    whole = encode_request_indeterminate(inner())
    return whole[: whole.index(b"\x00\x02{}\x00\x00") + 1] + pieces + b"\x00\x00"


test_tiny_pieces = unread("send the content in hundreds of thousands of one-byte chunks, to delay all other answers",
    "a limit on chunks of content", lambda _stage: in_pieces(b"\x01a" * 500_000),
    then=lambda stage: in_pieces(b"\x01 " * (MAX_REQUEST_PIECES - 1) + part(chat(stage))))  # fmt: skip


# The seal


def to(key: PrivateKey) -> Callable[[Stage], bytes]:
    return lambda _stage: bytes(seal_request(key.config, encode_request(inner()))[0])


def sealed(name: str, defence: str, refused: problems.Problem, seal: Callable[[Stage], bytes], **worker: Any) -> Test:
    """The attack of a caller that seals by hand. worker: what the worker has for it."""

    @attack(name, "client", defence, refused)
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
        running = await stage.worker(**worker)
        verdict.said((await gateway.run(seal(stage))).problem)
        assert running.calls == 0

    return test


class Boundless(RequestSealer):
    """Our own sealer refuses what the other side would."""

    def _account(self, length: int, *, final: bool) -> None:
        pass


def in_single_bytes(stage: Stage) -> bytes:
    message = encode_request(inner(chat(stage)), padded_to=MAX_REQUEST_CHUNKS)
    sealer = Boundless(stage.keys.pool.config)
    return b"".join(sealer.seal(message[at : at + 1]) for at in range(len(message))) + sealer.finish()[0]


SEED = secrets.token_bytes(32)
STRICT = PrivateKey(1, Kem.XWING, SEED, ((Kdf.HKDF_SHA256, Aead.AES_256_GCM),))
LAX = PrivateKey(1, Kem.XWING, SEED).config

test_unknown_key = sealed("seal to a key that the pool does not hold", "keys are looked up by their id", problems.UNKNOWN_KEY,
    to(PrivateKey.generate(200)))  # fmt: skip
test_another_kem = sealed(
    "seal under a key's id with another KEM", "a key has one KEM", problems.UNKNOWN_KEY, to(PrivateKey.generate(1, Kem.X25519))
)
test_low_order = sealed("encapsulate to a point of low order", "an all-zero shared secret is refused (RFC 9180 section 7.1.4)",
    problems.INVALID_REQUEST, lambda _stage: bytes.fromhex("02002000010002") + bytes(32) + b"\x00" + bytes(32))  # fmt: skip
test_not_offered = sealed("seal under an AEAD that the key's configuration does not offer",
    "the worker accepts only what its configuration offers", problems.INVALID_REQUEST,
    lambda _stage: bytes(seal_request(LAX, encode_request(inner()), LAX.suite((Aead.AES_128_GCM,)))[0]),
    keys={1: STRICT})  # fmt: skip
test_chunk_flood = sealed(
    "send a request with more chunks than any request needs", "a limit on chunks", problems.INVALID_REQUEST, in_single_bytes
)
