"""Targets of `lacre.wire`: BHTTP, key configurations, and sealed messages both ways.

What is sealed cannot be guessed by a fuzzer, so for sealed messages an input is a script: it says what an honest peer seals
with keys known here, and what is put in between. Every output must then be a beginning of what was sealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fuzz.target import Script, Target, outcome
from lacre import errors
from lacre.wire import bhttp, hpke, ohttp, varint
from lacre.wire import header as headers
from lacre.wire.opening import PrivateKey, RequestOpener, open_request
from parts.bent import cut

Opener = RequestOpener | ohttp.ResponseOpener
MALFORMED: Final = (errors.InvalidMessage, errors.MessageTooLarge, errors.TruncatedStream)
OF_A_HEADER: Final = (*MALFORMED, errors.UnsupportedSuite)
OF_A_CONFIGURATION: Final = (errors.InvalidMessage, errors.MessageTooLarge, errors.UnsupportedSuite)
OF_A_REQUEST: Final = (*OF_A_HEADER, errors.UnknownKeyId, errors.OpenError)
OF_A_RESPONSE: Final = (*MALFORMED, errors.OpenError)

KEYS: Final = {
    1: PrivateKey.derive(1, headers.Kem.X25519, bytes(range(32))),
    2: PrivateKey.derive(2, headers.Kem.XWING, bytes(range(32))),
}
SUITE: Final = headers.Suite(headers.Kem.X25519, headers.Kdf.HKDF_SHA256, headers.Aead.AES_256_GCM)
NONCE: Final = bytes(range(32))  # of every response: the secret is another's each time that it matters
_SHARED, _ENC = hpke.encapsulate_for_test_vectors(
    headers.Kem.X25519, KEYS[1].config.public_key, X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
)
HEADER: Final = headers.SealedHeader(1, SUITE, _ENC)
RESPONSE_SECRET: Final = ohttp.response_secret(hpke.Context(SUITE, _SHARED, ohttp.request_info(HEADER)), SUITE)

# What a script of a sealed message may ask for.
RECORD, FINAL, BYTES, LONG_RECORD = range(4)
HONEST: Final = 0  # the first byte of a script whose message begins as it should


# BHTTP


def request_written_alike(_data: bytes, request: bhttp.Request) -> None:
    """What was read can be written, in both forms, and is then read alike."""
    assert bhttp.decode_request(bhttp.encode_request(request)) == request
    assert bhttp.decode_request(bhttp.encode_request_indeterminate(request)) == request


def bhttp_response(data: bytes) -> None:
    """Splitting it anywhere changes nothing."""
    script = Script(data)
    places, message = script.cuts(), script.rest()
    whole = outcome(lambda: _events([message]), MALFORMED)
    assert whole == outcome(lambda: _events(cut(message, places)), MALFORMED)
    if isinstance(whole, list):
        size = sum(len(event.content) for event in whole if isinstance(event, bhttp.Data))
        assert size <= len(message)


def _events(pieces: list[bytes]) -> list[bhttp.Event]:
    """Everything that the message says, its content in one piece: where one ends means nothing."""
    decoder = bhttp.ResponseDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)] + decoder.close()
    content = b"".join(event.content for event in events if isinstance(event, bhttp.Data))
    return [bhttp.Data(content), *(event for event in events if not isinstance(event, bhttp.Data))]


# Key configurations and headers


def config_written_alike(_data: bytes, config: headers.KeyConfig) -> None:
    """And sealing to it works, or says that the key is none."""
    assert headers.KeyConfig.parse(config.encode()) == config
    outcome(lambda: ohttp.seal_request(config, b""), (errors.InvalidMessage,))


def list_written_alike(data: bytes, configs: tuple[headers.KeyConfig, ...]) -> None:
    encoded = headers.encode_key_list(configs)
    assert headers.parse_key_list(encoded) == configs
    assert len(encoded) <= len(data) <= headers.MAX_KEY_LIST


def header_is_whole(data: bytes, header: headers.SealedHeader) -> None:
    """It is the very bytes that came, and the outline of what follows is sound or refused."""
    assert data.startswith(header.raw)
    assert len(header.enc) == header.suite.kem.n_enc
    assert outcome(lambda: headers.inspect_request(data), OF_A_HEADER) in (header, *OF_A_HEADER)


# Sealed messages


@dataclass(frozen=True, slots=True)
class Sealed:
    """A message that a script describes. plaintext: what was honestly sealed into it. must_open: it is as it should be;
    must_not: it breaks a rule that no key is needed for.
    """

    message: bytes
    plaintext: bytes
    must_open: bool
    must_not: bool


def sealed_by(script: Script, aead: hpke.SequencedAead, start: bytes) -> Sealed:
    """start: what the message begins with; empty where the script is to say that too."""
    message, plaintext = start, b""
    sound, ended, empty_record = bool(start), False, False
    while script:
        kind, content = script.number() % 4, script.text()
        if kind == BYTES:
            message += content
            sound = sound and not content
            continue
        chunk = aead.seal(content, b"final" if kind == FINAL else b"")
        length = 0 if kind == FINAL else len(chunk)
        long_form = (length | 0xC0 << 56).to_bytes(8, "big")
        message += (long_form if kind == LONG_RECORD else varint.encode(length)) + chunk
        plaintext += content
        empty_record = empty_record or (kind != FINAL and not content)
        sound, ended = sound and not ended, ended or kind == FINAL
    return Sealed(message, plaintext, sound and ended and not empty_record, empty_record)


def ohttp_request(data: bytes) -> None:
    """Whole or in pieces, a request opens to all of what was sealed or does not open."""
    script = Script(data)
    places, start = script.cuts(), HEADER.raw if script.number() == HONEST else b""
    aead = hpke.Context(SUITE, _SHARED, ohttp.request_info(HEADER)).aead
    body = sealed_by(script, aead, start)
    whole = outcome(lambda: open_request(KEYS, body.message)[0], OF_A_REQUEST)
    opener = RequestOpener(KEYS)
    in_pieces = _opened(opener, cut(body.message, places), body, OF_A_REQUEST)
    if isinstance(whole, bytes):
        assert whole == in_pieces == body.plaintext
        assert not body.must_not
        assert headers.inspect_request(body.message) == opener.header
    else:
        assert in_pieces is None
        assert not body.must_open


def ohttp_response(data: bytes) -> None:
    """Whole or in pieces, an answer opens to all of what was sealed or is not complete."""
    script = Script(data)
    places, start = script.cuts(), NONCE if script.number() == HONEST else b""
    body = sealed_by(script, ohttp.response_aead(HEADER, RESPONSE_SECRET, NONCE), start)
    for pieces in ([body.message], cut(body.message, places)):
        opener = ohttp.ResponseOpener(HEADER, RESPONSE_SECRET)
        opened = _opened(opener, pieces, body, OF_A_RESPONSE)
        assert opener.complete is (opened is not None)
        if opener.complete:
            assert opened == body.plaintext
            assert not body.must_not
        else:
            assert not body.must_open


def _opened(opener: Opener, pieces: list[bytes], sealed: Sealed, refuses: tuple[type[errors.LacreError], ...]) -> bytes | None:
    """The whole plaintext, or None. What came before a refusal must be a beginning of what was sealed."""
    opened = b""
    try:
        for piece in pieces:
            opened += b"".join(opener.feed(piece))
            assert sealed.plaintext.startswith(opened)
        return opened + b"".join(opener.close())
    except refuses:
        return None


TARGETS: Final = (
    Target("bhttp_request", bhttp.decode_request, MALFORMED, request_written_alike),
    Target("bhttp_response", bhttp_response, ()),
    Target("key_config", headers.KeyConfig.parse, OF_A_CONFIGURATION, config_written_alike),
    Target("key_list", headers.parse_key_list, OF_A_CONFIGURATION, list_written_alike),
    Target("header", headers.SealedHeader.parse, OF_A_HEADER, header_is_whole),
    Target("ohttp_request", ohttp_request, ()),
    Target("ohttp_response", ohttp_response, ()),
)
