"""Sealed requests and responses, both roles joined in memory: what must work, and what must never open."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.wire import header
from lacre.wire.header import MAX_CHUNK, MAX_SEALED_REQUEST, Aead, Kdf, Kem, KeyConfig, Suite, inspect_request
from lacre.wire.ohttp import RequestSealer, ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey, RequestOpener, ResponseSealer, open_request
from lacre.wire.wiping import overwrite
from parts.bent import cut

KEYS = {1: PrivateKey.generate(1, Kem.X25519), 2: PrivateKey.generate(2, Kem.XWING)}
SUITES = [Suite(kem, Kdf.HKDF_SHA256, aead) for kem in Kem for aead in Aead]
BROKEN = (errors.ProtocolError, errors.VerificationError)
TAG = 16


def config_for(suite: Suite) -> KeyConfig:
    return KEYS[1 if suite.kem is Kem.X25519 else 2].config


def exchange(suite: Suite = SUITES[1], request: bytes = b"a prompt") -> tuple[ResponseSealer, ResponseOpener]:
    sealed, _, opener = seal_request(config_for(suite), request, suite)
    return open_request(KEYS, sealed)[2], opener


def read(opener: ResponseOpener, *pieces: bytes) -> bytes:
    opened = [plain for piece in pieces for plain in opener.feed(piece)]
    return b"".join(opened + opener.close())


suites = st.sampled_from(SUITES)
positions = st.lists(st.integers(0, 2**20), max_size=8)
pieces = st.lists(st.binary(max_size=100), max_size=6)


# What must work


@given(suites, pieces, st.binary(max_size=100), positions)
@settings(max_examples=150, deadline=None)
def test_a_message_opens_however_it_was_sealed_and_however_it_arrives(
    suite: Suite, parts: list[bytes], last: bytes, splits: list[int]
) -> None:
    sealer, plaintext = RequestSealer(config_for(suite), suite), b"".join(parts) + last
    sealed = b"".join(sealer.seal(part) for part in parts)
    end, response_opener = sealer.finish(last)
    sealed += end
    assert inspect_request(sealed) == sealer.header
    assert open_request(KEYS, sealed)[:2] == (plaintext, sealer.header)
    for places in (splits, range(len(sealed))):
        opener = RequestOpener(KEYS)
        opened = [plain for piece in cut(sealed, places) for plain in opener.feed(piece)]
        assert b"".join(opened + opener.close()) == plaintext
        assert opener.header == sealer.header
    answerer = opener.response_sealer()
    answer = b"".join(answerer.seal(part) for part in parts) + answerer.finish(last)
    for places in (splits, range(len(answer))):
        reader = ResponseOpener(response_opener._header, response_opener._secret)
        assert read(reader, *cut(answer, places)) == plaintext
        assert reader.complete


@pytest.mark.parametrize("size", [0, 1, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK, 3 * MAX_CHUNK + 5])
def test_long_pieces_become_several_chunks_and_no_chunk_is_empty(size: int) -> None:
    plaintext = (bytes(range(256)) * (size // 256 + 1))[:size]
    sealed = seal_request(KEYS[1].config, plaintext)[0]
    full = max(0, -(-size // MAX_CHUNK) - 1)
    assert len(sealed) == 39 + full * (4 + MAX_CHUNK + TAG) + 1 + (size - full * MAX_CHUNK) + TAG
    assert open_request(KEYS, sealed)[0] == plaintext
    sealer, opener = exchange()
    assert read(opener, sealer.seal(plaintext), sealer.finish()) == plaintext
    sealer, opener = exchange()
    assert read(opener, sealer.finish(plaintext)) == plaintext


def test_a_record_opens_as_soon_as_it_is_there() -> None:
    sealer, opener = exchange()
    first, second = sealer.seal(b"one"), sealer.seal(b"two")
    assert opener.feed(first[:-1]) == []
    assert opener.feed(first[-1:] + second) == [b"one", b"two"]
    assert not opener.complete
    with pytest.raises(errors.TruncatedStream):  # even if the text looked finished
        opener.close()


def test_longer_forms_of_a_length_open_too() -> None:
    """Lengths are not authenticated; RFC 9000's longer forms mean the same."""
    sealer, opener = exchange()
    record, last = sealer.seal(b"one"), sealer.finish(b"two")
    nonce, sealed = record[:32], record[33:]
    assert read(opener, nonce, b"\xc0" + bytes(6) + bytes([len(sealed)]) + sealed, b"\x40\x00" + last[1:]) == b"onetwo"


def test_every_seal_is_fresh() -> None:
    for key, head in ((KEYS[1], 39), (KEYS[2], 1127)):
        sealed = {seal_request(key.config, b"a prompt")[0] for _ in range(5)}
        assert len({body[:head] for body in sealed}) == len({body[head:] for body in sealed}) == 5


# What must never open


@dataclass
class Message:
    """A sealed request or response in pieces, and what opens it: as often as a test asks."""

    head: bytes
    records: list[bytes]
    last: bytes
    open: Callable[[bytes], bytes]

    @property
    def whole(self) -> bytes:
        return self.head + b"".join(self.records) + self.last


def at_once(data: bytes) -> bytes:
    return open_request(KEYS, data)[0]


def arriving(data: bytes) -> bytes:
    opener = RequestOpener(KEYS)
    return b"".join([*opener.feed(data), *opener.close()])


def message(role: str, suite: Suite = SUITES[1]) -> Message:
    if role != "response":
        request = RequestSealer(config_for(suite), suite)
        head, records = request.seal(b""), [request.seal(b"record %d" % number) for number in range(3)]
        return Message(head, records, request.finish(b"the end")[0], arriving if role == "request" else at_once)
    sealer, opener = exchange(suite)
    head, records = sealer.seal(b""), [sealer.seal(b"record %d" % number) for number in range(3)]
    last = sealer.finish(b"the end")
    return Message(head, records, last, lambda data: read(ResponseOpener(opener._header, opener._secret), data))


ROLES = ["whole request", "request", "response"]
PLAINTEXT = b"record 0record 1record 2the end"


@pytest.mark.parametrize(
    ("role", "suite"),
    [*(("whole request", SUITES[number]) for number in (1, 4)), *(("response", suite) for suite in SUITES[:3])],
    ids=str,
)
def test_any_flipped_bit_is_noticed(role: str, suite: Suite) -> None:
    made = message(role, suite)
    sealed = bytearray(made.whole)
    for bit in range(8 * len(sealed)):
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BROKEN):
            made.open(bytes(sealed))
        sealed[bit // 8] ^= 1 << bit % 8
    assert made.open(bytes(sealed)) == PLAINTEXT


@pytest.mark.parametrize("role", ROLES)
def test_a_message_cut_anywhere_is_never_whole(role: str) -> None:
    made = message(role)
    for length in range(len(made.whole)):
        with pytest.raises(BROKEN):
            made.open(made.whole[:length])
        if role == "request" and length < len(made.whole) - len("the end"):
            with pytest.raises(errors.TruncatedStream):
                inspect_request(made.whole[:length])


ORDERS = [*itertools.permutations(range(3)), (0, 2), (1, 2), (0, 1), (0, 0, 1, 2), (0, 1, 1, 2)]
LONG = ("ffffffffffffffff", "c000000000004011", "80004011")  # lengths, one above the limit and far above it
# What somebody makes of a message, or of two; the others are `OpenError`.
Bend = Callable[[Message, Message], bytes]
BENT: dict[str, tuple[type[Exception], Bend]] = {
    **{
        f"records {order}": (errors.OpenError, lambda m, _, o=order: m.head + b"".join(m.records[n] for n in o) + m.last)
        for order in ORDERS if order != (0, 1, 2)
    },
    "a byte after the end": (errors.OpenError, lambda m, _: m.whole + b"\x00"),
    "a record as the final chunk": (errors.OpenError, lambda m, _: m.head + b"\x00" + m.records[0][1:]),
    "the final chunk as a record": (errors.OpenError, lambda m, _: m.head + bytes([len(m.last) - 1]) + m.last[1:] + m.last),
    "the head of another": (errors.OpenError, lambda m, other: other.head + m.whole[len(m.head) :]),
    "a record of another": (errors.OpenError, lambda m, other: m.head + other.records[0] + m.last),
    "the end of another": (errors.OpenError, lambda m, other: m.head + b"".join(m.records) + other.last),
    "no final chunk": (errors.TruncatedStream, lambda m, _: m.head + b"".join(m.records)),
    "nothing but its head": (errors.TruncatedStream, lambda m, _: m.head),
    **{f"length {x}": (errors.MessageTooLarge, lambda m, _, x=x: m.head + bytes.fromhex(x)) for x in LONG},
    "the longest final chunk": (errors.OpenError, lambda m, _: m.head + b"\x00" + bytes(MAX_CHUNK + TAG)),
    "a longer final chunk": (errors.MessageTooLarge, lambda m, _: m.head + b"\x00" + bytes(MAX_CHUNK + TAG + 1)),
    "an empty record": (errors.InvalidMessage, lambda m, _: m.head + bytes([TAG]) + bytes(TAG)),
    "a record of no tag": (errors.InvalidMessage, lambda m, _: m.head + b"\x01\x00"),
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("how", BENT)
def test_a_bent_message_does_not_open(role: str, how: str) -> None:
    """And of a request, a relay refuses by its outline what no key is needed for."""
    error, bend = BENT[how]
    made = message(role)
    bent = bend(made, message(role))
    with pytest.raises(error):
        made.open(bent)
    if role == "request":
        with contextlib.nullcontext() if error is errors.OpenError else pytest.raises(error):
            inspect_request(bent)


def test_swapped_responses_do_not_open() -> None:
    one, other = message("response"), message("response")
    for opener, answer in ((one, other), (other, one)):
        with pytest.raises(errors.OpenError):
            opener.open(answer.whole)


def test_a_request_for_another_key_does_not_open() -> None:
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    with pytest.raises(errors.OpenError):
        open_request({1: PrivateKey.generate(1, Kem.X25519)}, sealed)
    with pytest.raises(errors.OpenError):  # `info` repeats `hdr`: nor does it for the same key under another id
        open_request({9: PrivateKey(9, Kem.X25519, KEYS[1]._secret)}, b"\x09" + sealed[1:])
    for keys in ({}, {2: KEYS[1]}, {1: KEYS[2]}):
        with pytest.raises(errors.UnknownKeyId):
            open_request(keys, sealed)


def test_an_algorithm_that_the_configuration_does_not_offer_is_refused_on_both_sides() -> None:
    only = PrivateKey(1, Kem.X25519, KEYS[1]._secret, ((Kdf.HKDF_SHA256, Aead.AES_128_GCM),))
    for config, suite in ((only.config, SUITES[1]), (KEYS[2].config, SUITES[0])):
        with pytest.raises(errors.UnsupportedSuite):
            seal_request(config, b"a prompt", suite)
    sealed = seal_request(KEYS[1].config, b"a prompt", SUITES[1])[0]
    with pytest.raises(errors.UnsupportedSuite):
        open_request({1: only}, sealed)


# Limits


def test_a_request_above_7_mib_is_refused_by_both_sides() -> None:
    with pytest.raises(errors.MessageTooLarge):
        seal_request(KEYS[1].config, bytes(MAX_SEALED_REQUEST))
    sealer = RequestSealer(KEYS[1].config)
    half = bytes(MAX_SEALED_REQUEST // 2)
    body = sealer.seal(half)
    with pytest.raises(errors.MessageTooLarge):
        sealer.finish(half)
    opener = RequestOpener(KEYS)
    opener.feed(body)
    with pytest.raises(errors.MessageTooLarge):
        opener.feed(bytes(MAX_SEALED_REQUEST // 2 + 1))
    with pytest.raises(errors.MessageTooLarge):
        inspect_request(message("request").whole + bytes(MAX_SEALED_REQUEST))


def test_the_largest_request_passes() -> None:
    chunks = MAX_SEALED_REQUEST // (4 + MAX_CHUNK + TAG)
    plaintext = bytes(chunks * MAX_CHUNK)
    sealed = seal_request(KEYS[2].config, plaintext)[0]
    assert MAX_SEALED_REQUEST - 2 * MAX_CHUNK < len(sealed) <= MAX_SEALED_REQUEST
    assert open_request(KEYS, sealed)[0] == plaintext


def test_a_request_of_too_many_chunks_is_refused_by_both_sides() -> None:
    sealer = RequestSealer(KEYS[1].config)
    sealed = b"".join(sealer.seal(b"x") for _ in range(header.MAX_REQUEST_CHUNKS - 1))
    with pytest.raises(errors.MessageTooLarge):
        sealer.seal(b"x")
    opener = RequestOpener(KEYS)
    opener.feed(sealed)
    inspect_request(sealed + bytes(1 + TAG))
    one = bytes([TAG + 1]) + bytes(TAG + 1)
    with pytest.raises(errors.MessageTooLarge):
        opener.feed(one)
    with pytest.raises(errors.MessageTooLarge):
        inspect_request(sealed + one + bytes(1 + TAG))


# One use


def used(*calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(errors.AlreadyUsedError):
            call()


def test_each_side_is_used_once() -> None:
    request = RequestSealer(KEYS[1].config)
    sealed = request.finish(b"a prompt")[0]
    used(request.finish, lambda: request.seal(b"more"))
    opener = RequestOpener(KEYS)
    for before in (b"", sealed):
        opener.feed(before)
        with pytest.raises(errors.UsageError, match="not opened to its end"):
            opener.response_sealer()
    opener.close()
    sealer = opener.response_sealer()
    used(opener.response_sealer, lambda: opener.feed(b""), opener.close)
    sealer.finish(b"an answer")
    used(sealer.finish, lambda: sealer.seal(b"more"))
    sealer, response = exchange()
    read(response, sealer.finish(b"answer"))
    used(response.close, lambda: response.feed(b""))


def test_a_request_that_did_not_open_cannot_be_answered() -> None:
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    for keys, body in (({}, sealed), (KEYS, sealed[:-1] + b"\x00")):
        opener = RequestOpener(keys)
        with pytest.raises(BROKEN):
            opener.feed(body)
            opener.close()
        with pytest.raises(errors.UsageError, match="not opened to its end"):
            opener.response_sealer()
        used(lambda opener=opener: opener.feed(b""))


def test_nothing_opens_after_an_error() -> None:
    sealer, opener = exchange()
    good, other = sealer.seal(b"one"), sealer.seal(b"two")
    with pytest.raises(errors.OpenError):
        opener.feed(good[:32] + other)
    used(lambda: opener.feed(good[32:]))
    assert not opener.complete


# Private keys


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.config.kem.label)
def test_a_private_key_survives_storage_and_shows_nothing(key: PrivateKey) -> None:
    secret = bytearray(key._secret)
    copied = PrivateKey(key.config.key_id, key.config.kem, secret)
    overwrite(secret)
    stored = key.to_bytes()
    assert secret == bytes(32) and copied.to_bytes() == stored
    again = PrivateKey.from_bytes(stored)
    assert again.config == key.config
    assert again.to_bytes() == stored
    assert open_request({key.config.key_id: again}, seal_request(key.config, b"a prompt")[0])[0] == b"a prompt"
    shown = repr(key) + str(key)
    assert key._secret.hex() not in shown and repr(key._secret) not in shown


@pytest.mark.parametrize("kem", [Kem.X25519, Kem.XWING])
def test_a_destroyed_private_key_opens_nothing_and_holds_nothing(kem: Kem) -> None:
    key = PrivateKey.generate(1, kem)
    first, second = (seal_request(key.config, b"a prompt")[0] for _ in range(2))
    _, _, sealer = open_request({1: key}, first)
    key.destroy()
    key.destroy()
    assert bytes(key._secret) == bytes(32)
    with pytest.raises(errors.UsageError, match="destroyed"):
        open_request({1: key}, second)
    with pytest.raises(errors.UsageError, match="destroyed"):
        key.to_bytes()
    assert sealer.finish(b"an answer")  # what was opened before can still be answered


@given(st.binary(max_size=80), st.integers(0, 80))
@settings(max_examples=50, deadline=None)
def test_what_is_not_a_private_key_is_said_to_be_none(noise: bytes, kept: int) -> None:
    stored = KEYS[1].to_bytes()
    if stored[:kept] + noise == stored:
        return
    try:
        PrivateKey.from_bytes(stored[:kept] + noise)
    except errors.SettingsError as error:
        assert "not a private key" in str(error)
    else:
        assert kept + len(noise) >= 12 + 3 + 32 + 4  # another key of the right form


def test_secrets_are_in_no_repr() -> None:
    request = RequestSealer(KEYS[1].config)
    _, opener = request.finish(b"a prompt")
    for thing in (request, opener, RequestOpener(KEYS), KEYS[1]):
        assert opener._secret.hex() not in repr(thing)
        assert "a prompt" not in repr(thing)


# Anything at all


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_no_bytes_raise_anything_but_a_typed_error(data: st.DataObject) -> None:
    """Damage of any kind to a good message, then any cut of it."""
    sealer = RequestSealer(KEYS[1].config)
    sealed = sealer.seal(b"some") + sealer.finish(b"prompt")[0]
    start = data.draw(st.integers(0, len(sealed)))
    end = data.draw(st.integers(start, len(sealed)))
    damaged = sealed[:start] + data.draw(st.binary(max_size=60)) + sealed[end:]
    answer_sealer, opener = exchange()
    answer = answer_sealer.seal(b"some") + answer_sealer.finish(b"answer")
    damaged_answer = answer[:start] + data.draw(st.binary(max_size=60)) + answer[end:]
    with contextlib.suppress(*BROKEN):
        assert open_request(KEYS, damaged)[0] == b"someprompt"
    with contextlib.suppress(*BROKEN):
        assert read(opener, *cut(damaged_answer, data.draw(positions))) == b"someanswer"
