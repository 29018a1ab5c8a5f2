"""A malicious caller: the form of what it seals, and the seal itself. The worker takes neither for a request."""

from __future__ import annotations

import secrets

import pytest

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import FORM, by_hand, chat, part, unread
from lacre import problems
from lacre.wire.bhttp import MAX_REQUEST_PIECES, encode_request, encode_request_indeterminate
from lacre.wire.fields import MAX_FIELDS
from lacre.wire.header import MAX_REQUEST_CHUNKS, Aead, Kdf, Kem
from lacre.wire.ohttp import RequestSealer, seal_request
from lacre.wire.opening import PrivateKey
from parts.stage import Stage

# The form of what is sealed


@attack("lie about the length of the content", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("length", [b"1", b"3", b"99999999999999", b"+2", b"2, 3", b"0x2", b"9" * 20])
async def test_content_length(stage: Stage, gateway: GatewayOwner, verdict: Verdict, length: bytes) -> None:
    await unread(gateway, stage, verdict, by_hand((b"content-length", length)))


@attack("give two lengths of the content", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
async def test_two_lengths(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    for other in range(3, 20):
        second = (b"content-length", str(other).encode())
        verdict.said((await gateway.submit(by_hand((b"content-length", b"2"), second))).problem)


@attack("smuggle a second request by a transfer coding", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("header", [(b"transfer-encoding", b"chunked"), (b"connection", b"upgrade"), (b"te", b"gzip")])
async def test_transfer_coding(stage: Stage, gateway: GatewayOwner, verdict: Verdict, header: tuple[bytes, bytes]) -> None:
    await unread(gateway, stage, verdict, by_hand(header, content=b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n"))


@attack(
    "split a header by line breaks, or name one in capitals or like a pseudo-field",
    by="client",
    defence=FORM,
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize(
    "header",
    [(b"x", b"a\r\nhost: evil"), (b"x\ny", b"a"), (b"x", b"\x00"), (b"Date", b"a"), (b":path", b"/admin"), (b"", b"a")],
)
async def test_header_splitting(stage: Stage, gateway: GatewayOwner, verdict: Verdict, header: tuple[bytes, bytes]) -> None:
    await unread(gateway, stage, verdict, by_hand(header))


@attack(
    "flood the worker with headers",
    by="client",
    defence="limits on fields and on their sections",
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize(
    "headers",
    [((b"x", b"a"),) * MAX_FIELDS, ((b"x", b"a" * 16384),) * 5, ((b"x", b"a" * 16385),), ((b"x" * 257, b"a"),)],
    ids=["many", "large", "long", "long-name"],
)
async def test_header_flood(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    await unread(gateway, stage, verdict, by_hand(*headers))


@attack(
    "announce a part of the message of 2^62 - 1 bytes",
    by="client",
    defence="a length is checked before anything is buffered",
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize("before", [b"", b"\x04POST", b"\x04POST\x05https\x0dlacre.invalid\x01/"])
async def test_huge_part(stage: Stage, gateway: GatewayOwner, verdict: Verdict, before: bytes) -> None:
    await unread(gateway, stage, verdict, b"\x00" + before + b"\xff" * 8)


@attack(
    "send the content in hundreds of thousands of one-byte chunks, to delay all other answers",
    by="client",
    defence="a limit on chunks of content",
    refused=problems.INVALID_REQUEST,
)
async def test_tiny_pieces(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    whole = encode_request_indeterminate(inner())
    head = whole[: whole.index(b"\x00\x02{}\x00\x00") + 1]
    await unread(gateway, stage, verdict, head + b"\x01a" * 500_000 + b"\x00\x00")
    fewer = head + b"\x01 " * (MAX_REQUEST_PIECES - 1) + part(chat(stage)) + b"\x00\x00"
    assert (await gateway.submit(fewer)).status == 200


@attack(
    "end the message in the middle of a part, inside a complete seal",
    by="client",
    defence=FORM,
    refused=problems.INVALID_REQUEST,
)
@pytest.mark.parametrize("kept", [0, 1, 9, 40, -3])
async def test_cut_inside(stage: Stage, gateway: GatewayOwner, verdict: Verdict, kept: int) -> None:
    await unread(gateway, stage, verdict, encode_request(inner(b"0123456789"))[:kept])


@attack("put a second message after the first", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
async def test_after_the_end(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await unread(gateway, stage, verdict, encode_request(inner()) * 2)


@attack("seal a response in place of a request", by="client", defence=FORM, refused=problems.INVALID_REQUEST)
@pytest.mark.parametrize("framing", [1, 3, 4, 63])
async def test_framing(stage: Stage, gateway: GatewayOwner, verdict: Verdict, framing: int) -> None:
    await unread(gateway, stage, verdict, bytes([framing]) + encode_request(inner())[1:])


# The seal


async def sealed_by_hand(gateway: GatewayOwner, stage: Stage, verdict: Verdict, sealed: bytes) -> None:
    worker = await stage.worker()
    ran = await gateway.run(sealed)
    verdict.said(ran.problem)
    assert worker.calls == 0


@attack(
    "seal to a key that the pool does not hold",
    by="client",
    defence="keys are looked up by their id",
    refused=problems.UNKNOWN_KEY,
)
async def test_unknown_key(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    sealed, *_ = seal_request(PrivateKey.generate(200).config, encode_request(inner()))
    await sealed_by_hand(gateway, stage, verdict, sealed)


@attack("seal under a key's id with another KEM", by="client", defence="a key has one KEM", refused=problems.UNKNOWN_KEY)
async def test_another_kem(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    sealed, *_ = seal_request(PrivateKey.generate(1, Kem.X25519).config, encode_request(inner()))
    await sealed_by_hand(gateway, stage, verdict, sealed)


@attack(
    "encapsulate to a point of low order",
    by="client",
    defence="an all-zero shared secret is refused (RFC 9180 section 7.1.4)",
    refused=problems.INVALID_REQUEST,
)
async def test_low_order(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await sealed_by_hand(gateway, stage, verdict, bytes.fromhex("02002000010002") + bytes(32) + b"\x00" + bytes(32))


@attack(
    "seal under an AEAD that the key's configuration does not offer",
    by="client",
    refused=problems.INVALID_REQUEST,
    defence="the worker accepts only what its configuration offers",
)
async def test_not_offered(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    seed = secrets.token_bytes(32)
    strict = PrivateKey(1, Kem.XWING, seed, ((Kdf.HKDF_SHA256, Aead.AES_256_GCM),))
    lax = PrivateKey(1, Kem.XWING, seed).config
    worker = await stage.worker(keys={1: strict})
    sealed, *_ = seal_request(lax, encode_request(inner()), lax.suite((Aead.AES_128_GCM,)))
    verdict.said((await gateway.run(sealed)).problem)
    assert worker.calls == 0


@attack(
    "send a request with more chunks than any request needs",
    by="client",
    defence="a limit on chunks",
    refused=problems.INVALID_REQUEST,
)
async def test_chunk_flood(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    """Each of a byte, and all of them good."""
    message = encode_request(inner(chat(stage)), padded_to=MAX_REQUEST_CHUNKS)
    sealer = Boundless(stage.keys.pool.config)
    sealed = b"".join(sealer.seal(message[at : at + 1]) for at in range(len(message)))
    await sealed_by_hand(gateway, stage, verdict, sealed + sealer.finish()[0])


class Boundless(RequestSealer):
    """Our own sealer refuses what the other side would."""

    def _account(self, length: int, *, final: bool) -> None:
        pass
