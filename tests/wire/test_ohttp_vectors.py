"""The examples of the two documents, byte for byte. A failure here is a wire nobody else speaks."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lacre.wire import bhttp, hpke, ohttp
from lacre.wire.header import Aead, Kdf, Kem, KeyConfig, SealedHeader, Suite, inspect_request
from lacre.wire.opening import PrivateKey, RequestOpener, ResponseSealer, open_request

SUITE = Suite(Kem.X25519, Kdf.HKDF_SHA256, Aead.AES_128_GCM)
OFFERED = ((SUITE.kdf, Aead.AES_128_GCM), (SUITE.kdf, Aead.CHACHA20_POLY1305))
REQUEST = bytes.fromhex("00034745540568747470730b6578616d706c652e636f6d012f")
RESPONSE = bytes.fromhex("0140c8")


class Chunked:
    """draft-ietf-ohai-chunked-ohttp, "Example"."""

    secret_key = bytes.fromhex("1c190d72acdbe4dbc69e680503bb781a932c70a12c8f3754434c67d8640d8698")
    key_config = bytes.fromhex("010020668eb21aace159803974a4c67f08b4152d29bed10735fd08f98ccdd6fe09570800080001000100010003")
    ephemeral = bytes.fromhex("b26d565f3f875ed480d1abced3d665159650c99174fd0b124ac4bda0c64ae324")
    info = bytes.fromhex("6d6573736167652f6268747470206368756e6b6564207265717565737400 01002000010001")
    header = bytes.fromhex("01002000010001 8811eb457e100811c40a0aa71340a1b81d804bb986f736f2f566a7199761a032")
    request_chunks = (
        bytes.fromhex("1c2ad24942d4d692563012f2980c8fef437a336b9b2fc938ef77a5834f"),
        bytes.fromhex("1d2e33d8fd25577afe31bd1c79d094f76b6250ae6549b473ecd950501311"),
        bytes.fromhex("001c6c1395d0ef7c1022297966307b8a7f"),
    )
    exported = bytes.fromhex("1d4484834ae36102a6ac42a5523454d9")
    nonce = bytes.fromhex("bcce7f4cb921309ba5d62edf1769ef09")
    prk = bytes.fromhex("3967884b5f7b4bce4a5320a3e3f79fdc97389f7deba1c1e11c5ea62278187786")
    key = bytes.fromhex("8209f78f2a1610d80c7125009b00aff0")
    base_nonce = bytes.fromhex("fead854635d2d5527d64f546")
    response_chunks = (
        bytes.fromhex("1179bf1cc87fa0e2c02de4546945aa3d1e48"),
        bytes.fromhex("12b348b5bd4c594c16b6170b07b475845d1f32"),
        bytes.fromhex("00ed9d8a796617a5b27265f4d73247f639"),
    )
    request = header + b"".join(request_chunks)
    response = nonce + b"".join(response_chunks)


@pytest.fixture
def key() -> PrivateKey:
    return PrivateKey(1, Kem.X25519, Chunked.secret_key, OFFERED)


def vector_sealer(config: KeyConfig) -> ohttp.RequestSealer:
    """A sealer whose encapsulation is the vector's. Real ones are only ever made with a fresh one."""
    ephemeral = X25519PrivateKey.from_private_bytes(Chunked.ephemeral)
    sealer = object.__new__(ohttp.RequestSealer)
    sealer._start(config, SUITE, *hpke.encapsulate_for_test_vectors(SUITE.kem, config.public_key, ephemeral))
    return sealer


def test_chunked_key_configuration(key: PrivateKey) -> None:
    assert key.config.encode() == Chunked.key_config
    assert KeyConfig.parse(Chunked.key_config) == key.config


def test_chunked_request(key: PrivateKey) -> None:
    sealer = vector_sealer(key.config)
    assert ohttp.request_info(sealer.header) == Chunked.info
    sealed = [sealer.seal(REQUEST[:12]), sealer.seal(REQUEST[12:]), sealer.finish()[0]]
    assert sealed == [Chunked.header + Chunked.request_chunks[0], *Chunked.request_chunks[1:]]
    assert sealer.header.raw == Chunked.header
    assert inspect_request(Chunked.request) == sealer.header
    opener = RequestOpener({1: key})
    assert opener.feed(Chunked.request) == [REQUEST[:12], REQUEST[12:]]
    assert opener.close() == []
    assert bhttp.decode_request(REQUEST) == bhttp.Request("GET", "https", "example.com", "/")
    # In one chunk it seals otherwise, and opens the same.
    other = vector_sealer(key.config).finish(REQUEST)[0]
    assert other != Chunked.request
    assert open_request({1: key}, other)[0] == REQUEST


def test_chunked_response_schedule(key: PrivateKey) -> None:
    header = SealedHeader.parse(Chunked.header)
    context = hpke.Context(SUITE, key.decapsulate(header.enc), ohttp.request_info(header))
    secret = ohttp.response_secret(context, SUITE)
    assert secret == Chunked.exported
    prk = hpke.extract(header.enc + Chunked.nonce, secret)
    assert prk == Chunked.prk
    assert hpke.expand(prk, b"key", 16) == Chunked.key
    assert hpke.expand(prk, b"nonce", 12) == Chunked.base_nonce
    from_parts = hpke.SequencedAead(SUITE.aead, Chunked.key, Chunked.base_nonce)
    assert from_parts.seal(b"x") == ohttp.response_aead(header, secret, Chunked.nonce).seal(b"x")


def test_chunked_response(key: PrivateKey) -> None:
    sealer = ResponseSealer(SealedHeader.parse(Chunked.header), Chunked.exported, Chunked.nonce)
    sealed = [sealer.seal(RESPONSE[:1]), sealer.seal(RESPONSE[1:]), sealer.finish()]
    assert sealed == [Chunked.nonce + Chunked.response_chunks[0], *Chunked.response_chunks[1:]]
    _, opener = vector_sealer(key.config).finish(REQUEST)
    assert opener.feed(Chunked.response) == [RESPONSE[:1], RESPONSE[1:]]
    assert (opener.close(), opener.complete) == ([], True)
    decoder = bhttp.ResponseDecoder()
    assert decoder.feed(RESPONSE) == []
    assert decoder.close() == [bhttp.ResponseHead(200, ()), bhttp.End()]


def test_rfc_9458_appendix_a() -> None:
    """The non-chunked form is not ours to speak, but its key schedule is: only two labels differ."""
    secret_key = bytes.fromhex("3c168975674b2fa8e465970b79c8dcf09f1c741626480bd4c6162fc5b6a98e1a")
    ephemeral = bytes.fromhex("bc51d5e930bda26589890ac7032f70ad12e4ecb37abb1b65b1256c9c48999c73")
    sealed_request = bytes.fromhex(
        "010020000100014b28f881333e7c164ffc499ad9796f877f4e1051ee6d31bad1"
        "9dec96c208b4726374e469135906992e1268c594d2a10c695d858c40a026e796"
        "5e7d86b83dd440b2c0185204b4d63525"
    )
    nonce = bytes.fromhex("c789e7151fcba46158ca84b04464910d")
    sealed_response = bytes.fromhex("c789e7151fcba46158ca84b04464910d86f9013e404feea014e7be4a441f234f857fbd")
    key = PrivateKey(1, Kem.X25519, secret_key, OFFERED)
    config = "01002031e1f05a740102115220e9af918f738674aec95f54db6e04eb705aae8e79815500080001000100010003"
    assert key.config.encode().hex() == config

    header = SealedHeader.parse(sealed_request)
    info = b"message/bhttp request" + b"\x00" + header.identifiers
    ephemeral_key = X25519PrivateKey.from_private_bytes(ephemeral)
    shared_secret, enc = hpke.encapsulate_for_test_vectors(Kem.X25519, key.config.public_key, ephemeral_key)
    assert key.decapsulate(enc) == shared_secret
    client, gateway = hpke.Context(SUITE, shared_secret, info), hpke.Context(SUITE, shared_secret, info)
    assert header.raw + client.aead.seal(REQUEST) == sealed_request
    assert gateway.aead.open(sealed_request[len(header.raw) :]) == REQUEST

    secret = gateway.export(b"message/bhttp response", ohttp.response_nonce_length(SUITE))
    assert secret.hex() == "62d87a6ba569ee81014c2641f52bea36"
    prk = hpke.extract(enc + nonce, secret)
    assert prk.hex() == "979aaeae066cf211ab407b31ae49767f344e1501e475c84e8aff547cc5a683db"
    assert hpke.expand(prk, b"key", 16).hex() == "5d0172a080e428b16d298c4ea0db620d"
    assert hpke.expand(prk, b"nonce", 12).hex() == "f6bf1aeb88d6df87007fa263"
    assert nonce + ohttp.response_aead(header, secret, nonce).seal(RESPONSE) == sealed_response


PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "vectors").glob("*.json"))


def test_the_default_suite_is_published() -> None:
    assert len(PUBLISHED) == 3
    vector = json.loads(next(path for path in PUBLISHED if path.stem == "xwing-aes-256-gcm").read_text())
    assert SealedHeader.parse(bytes.fromhex(vector["header"])).suite == Suite(Kem.XWING, Kdf.HKDF_SHA256, Aead.AES_256_GCM)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_an_exchange_that_docs_wire_md_publishes(path: Path) -> None:
    """What another client is checked against must stay true of this one."""
    vector = {name: value for name, value in json.loads(path.read_text()).items() if name != "about"}
    header, chunks = bytes.fromhex(vector["header"]), [bytes.fromhex(chunk) for chunk in vector["request_chunks"]]
    config = KeyConfig.parse(bytes.fromhex(vector["key_configuration"]))
    key = PrivateKey(config.key_id, config.kem, bytes.fromhex(vector["secret_key"]), config.algorithms)
    assert key.config == config
    sealed = SealedHeader.parse(header)
    assert f"{sealed.suite.kem.name}-{sealed.suite.aead.name}".lower().replace("_", "-") == path.stem
    assert sealed.digest.hex() == vector["header_sha256"]
    assert ohttp.request_info(sealed).hex() == vector["info"]
    assert key.decapsulate(sealed.enc).hex() == vector["shared_secret"]
    assert open_request({config.key_id: key}, header + b"".join(chunks))[0].hex() == vector["request_binary_http"]

    nonce, secret = bytes.fromhex(vector["response_nonce"]), bytes.fromhex(vector["exported_secret"])
    prk = hpke.extract(sealed.enc + nonce, secret)
    assert prk.hex() == vector["prk"]
    assert hpke.expand(prk, b"key", sealed.suite.aead.n_key).hex() == vector["response_key"]
    assert hpke.expand(prk, b"nonce", 12).hex() == vector["response_base_nonce"]
    sealer, opener = ResponseSealer(sealed, secret, nonce), ohttp.ResponseOpener(sealed, secret)
    assert sealer.seal(b"") == nonce
    assert opener.feed(nonce) == []
    for plain, chunk in zip(vector["response_records"], vector["response_chunks"][:-1], strict=True):
        assert sealer.seal(bytes.fromhex(plain)).hex() == chunk
        assert opener.feed(bytes.fromhex(chunk)) == [bytes.fromhex(plain)]
    assert sealer.finish().hex() == vector["response_chunks"][-1]
    opener.feed(bytes.fromhex(vector["response_chunks"][-1]))
    assert opener.close() == []
    decoder = bhttp.ResponseDecoder()
    events = [event for record in vector["response_records"] for event in decoder.feed(bytes.fromhex(record))]
    assert events[-1] == bhttp.End((("lacre-receipt", "e30.e30.AA"),))
