"""A malicious caller: the form of what it seals, and the seal itself. The worker takes neither for a request."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import FORM, by_hand, chat, part
from hostile.shapes import Test, unread
from lacre import problems
from lacre.wire.bhttp import MAX_REQUEST_PIECES, encode_request, encode_request_indeterminate
from lacre.wire.fields import MAX_FIELDS
from lacre.wire.header import MAX_REQUEST_CHUNKS, Aead, Kdf, Kem
from lacre.wire.ohttp import RequestSealer, seal_request
from lacre.wire.opening import PrivateKey
from parts.stage import Stage

# The form of what is sealed


def sent(*headers: tuple[bytes, bytes], **parts: bytes) -> Callable[[Stage], bytes]:
    return lambda _stage: by_hand(*headers, **parts)


test_content_length = unread(
    "lie about the length of the content", FORM,
    *(sent((b"content-length", length)) for length in (b"1", b"3", b"99999999999999", b"+2", b"2, 3", b"0x2", b"9" * 20)),
)  # fmt: skip
test_two_lengths = unread("give two lengths of the content", FORM,
    *(sent((b"content-length", b"2"), (b"content-length", b"%d" % other)) for other in range(3, 20)))  # fmt: skip
test_transfer_coding = unread(
    "smuggle a second request by a transfer coding", FORM,
    *(sent(header, content=b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n")
      for header in ((b"transfer-encoding", b"chunked"), (b"connection", b"upgrade"), (b"te", b"gzip"))),
)  # fmt: skip
test_header_splitting = unread("split a header by line breaks, or name one in capitals or like a pseudo-field", FORM,
    sent((b"x", b"a\r\nhost: evil")), sent((b"x\ny", b"a")), sent((b"x", b"\x00")), sent((b"Date", b"a")),
    sent((b":path", b"/admin")), sent((b"", b"a")))  # fmt: skip
test_header_flood = unread("flood the worker with headers", "limits on fields and on their sections",
    sent(*[(b"x", b"a")] * MAX_FIELDS), sent(*[(b"x", b"a" * 16384)] * 5), sent((b"x", b"a" * 16385)),
    sent((b"x" * 257, b"a")))  # fmt: skip
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
