"""Sealed requests and responses, both roles joined in memory: what must work, and what must never open."""

import contextlib
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.wire.header import (
    MAX_CHUNK,
    MAX_REQUEST_CHUNKS,
    MAX_SEALED_REQUEST,
    Aead,
    Kdf,
    Kem,
    KeyConfig,
    Suite,
    inspect_request,
)
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
def test_a_request_opens_however_it_was_sealed_and_however_it_arrives(
    suite: Suite, parts: list[bytes], last: bytes, splits: list[int]
) -> None:
    sealer = RequestSealer(config_for(suite), suite)
    sealed = b"".join(sealer.seal(part) for part in parts) + sealer.finish(last)[0]
    plaintext = b"".join(parts) + last
    assert inspect_request(sealed) == sealer.header
    assert open_request(KEYS, sealed)[:2] == (plaintext, sealer.header)

    opener = RequestOpener(KEYS)
    opened = [plain for piece in cut(sealed, splits) for plain in opener.feed(piece)]
    assert b"".join(opened + opener.close()) == plaintext
    assert opener.header == sealer.header


@given(suites, pieces, st.binary(max_size=100), positions)
@settings(max_examples=150, deadline=None)
def test_a_response_opens_however_it_was_sealed_and_however_it_arrives(
    suite: Suite, parts: list[bytes], last: bytes, splits: list[int]
) -> None:
    sealer, opener = exchange(suite)
    sealed = b"".join(sealer.seal(part) for part in parts) + sealer.finish(last)
    assert read(opener, *cut(sealed, splits)) == b"".join(parts) + last
    assert opener.complete


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_byte_by_byte(suite: Suite) -> None:
    sealed, _, opener = seal_request(config_for(suite), b"a prompt", suite)
    request = RequestOpener(KEYS)
    opened = [plain for byte in sealed for plain in request.feed(bytes([byte]))]
    assert opened + request.close() == [b"a prompt"]
    sealer = request.response_sealer()
    answer = sealer.seal(b"an") + sealer.seal(b"answer") + sealer.finish()
    assert read(opener, *(bytes([byte]) for byte in answer)) == b"ananswer"


@pytest.mark.parametrize("size", [0, 1, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK, 3 * MAX_CHUNK + 5])
def test_long_pieces_become_several_chunks_and_no_chunk_is_empty(size: int) -> None:
    plaintext = bytes(range(256)) * (size // 256 + 1)
    plaintext = plaintext[:size]
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


def test_longer_forms_of_a_length_open_too() -> None:
    """Lengths are not authenticated; RFC 9000's longer forms mean the same."""
    sealer, opener = exchange()
    record, last = sealer.seal(b"one"), sealer.finish(b"two")
    nonce, sealed = record[:32], record[33:]
    assert read(opener, nonce, b"\xc0" + bytes(6) + bytes([len(sealed)]) + sealed, b"\x40\x00" + last[1:]) == b"onetwo"


def test_every_seal_is_fresh() -> None:
    sealed = {seal_request(KEYS[2].config, b"a prompt")[0] for _ in range(5)}
    assert len({body[:1127] for body in sealed}) == len({body[1127:] for body in sealed}) == 5


# What must never open


@pytest.mark.parametrize("kem", list(Kem))
def test_any_flipped_bit_of_a_request_is_noticed(kem: Kem) -> None:
    sealer = RequestSealer(KEYS[1 if kem is Kem.X25519 else 2].config)
    sealed = bytearray(sealer.seal(b"some") + sealer.seal(b"prompt") + sealer.finish(b".")[0])
    for bit in range(8 * len(sealed)):
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BROKEN):
            open_request(KEYS, bytes(sealed))
        sealed[bit // 8] ^= 1 << bit % 8
    assert open_request(KEYS, bytes(sealed))[0] == b"someprompt."


@pytest.mark.parametrize("aead", list(Aead))
def test_any_flipped_bit_of_a_response_is_noticed(aead: Aead) -> None:
    suite = Suite(Kem.X25519, Kdf.HKDF_SHA256, aead)
    sealer, opener = exchange(suite)
    sealed = bytearray(sealer.seal(b"some") + sealer.seal(b"answer") + sealer.finish(b"."))
    for bit in range(8 * len(sealed)):
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BROKEN):
            read(ResponseOpener(opener._header, opener._secret), bytes(sealed))
        sealed[bit // 8] ^= 1 << bit % 8
    assert read(opener, bytes(sealed)) == b"someanswer."


def test_a_request_cut_anywhere_is_never_whole() -> None:
    sealer = RequestSealer(KEYS[1].config)
    sealed = sealer.seal(b"some") + sealer.seal(b"prompt") + sealer.finish(b"end")[0]
    for length in range(len(sealed)):
        with pytest.raises(BROKEN):
            open_request(KEYS, sealed[:length])


def test_a_response_cut_anywhere_is_never_whole() -> None:
    sealer, opener = exchange()
    sealed = sealer.seal(b"some") + sealer.seal(b"answer") + sealer.finish(b"end")
    for length in range(len(sealed)):
        with pytest.raises(BROKEN):
            read(ResponseOpener(opener._header, opener._secret), sealed[:length])


def test_a_response_without_its_final_chunk_is_truncated_even_if_the_text_looked_finished() -> None:
    for kept in (0, 1, 2):
        sealer, opener = exchange()
        records = [sealer.seal(b"Bye."), sealer.seal(b"[DONE]")]
        for record in records[:kept]:
            opener.feed(record)
        with pytest.raises(errors.TruncatedStream):
            opener.close()
        assert not opener.complete


def test_a_record_is_not_a_final_chunk_and_a_final_chunk_is_not_a_record() -> None:
    sealer, opener = exchange()
    record = sealer.seal(b"answer")
    with pytest.raises(errors.OpenError):
        read(opener, record[:32] + b"\x00" + record[33:])
    sealer, opener = exchange()
    nonce, last = sealer.seal(b""), sealer.finish(b"answer")
    with pytest.raises(errors.OpenError):
        opener.feed(nonce + bytes([len(last) - 1]) + last[1:])


def test_what_follows_the_final_chunk_is_noticed() -> None:
    sealer, opener = exchange()
    with pytest.raises(errors.OpenError):
        read(opener, sealer.finish(b"answer") + b"\x00")
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    with pytest.raises(errors.OpenError):
        open_request(KEYS, sealed + b"\x00")


@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)])
def test_swapped_records_do_not_open(order: tuple[int, ...]) -> None:
    sealer, opener = exchange()
    nonce, records = sealer.seal(b""), [sealer.seal(b"same length %d" % number) for number in range(3)]
    with pytest.raises(errors.OpenError):
        opener.feed(nonce + b"".join(records[number] for number in order))
    request = RequestSealer(KEYS[1].config)
    header, chunks = request.seal(b""), [request.seal(b"same length %d" % number) for number in range(3)]
    with pytest.raises(errors.OpenError):
        open_request(KEYS, header + b"".join(chunks[number] for number in order) + request.finish()[0])


def test_left_out_and_repeated_records_do_not_open() -> None:
    for choice in ((0, 2), (1, 2), (0, 0, 1, 2), (0, 1, 1, 2)):
        sealer, opener = exchange()
        records = [sealer.seal(b""), *(sealer.seal(b"record %d" % number) for number in range(3))]
        with pytest.raises(errors.OpenError):
            read(opener, records[0], *(records[number + 1] for number in choice), sealer.finish())


def test_swapped_responses_do_not_open() -> None:
    (first, first_opener), (second, second_opener) = exchange(), exchange()
    first_answer, second_answer = first.finish(b"for one"), second.finish(b"for two")
    for opener, answer in ((first_opener, second_answer), (second_opener, first_answer)):
        with pytest.raises(errors.OpenError):
            read(opener, answer)


def test_records_of_two_responses_do_not_mix() -> None:
    (first, opener), (second, _) = exchange(), exchange()
    with pytest.raises(errors.OpenError):
        read(opener, first.seal(b"one"), second.seal(b"")[32:], second.finish(b"other"))


def test_chunks_of_two_requests_do_not_mix() -> None:
    first, second = RequestSealer(KEYS[1].config), RequestSealer(KEYS[1].config)
    header = first.seal(b"")
    second.seal(b"")
    with pytest.raises(errors.OpenError):
        open_request(KEYS, header + second.finish(b"a prompt")[0])


def test_a_request_for_another_key_does_not_open() -> None:
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    with pytest.raises(errors.OpenError):
        open_request({1: PrivateKey.generate(1, Kem.X25519)}, sealed)
    for keys in ({}, {2: KEYS[1]}, {1: KEYS[2]}):
        with pytest.raises(errors.UnknownKeyId):
            open_request(keys, sealed)


def test_the_key_id_and_the_suite_are_bound_to_the_keys() -> None:
    """`info` repeats `hdr`: the same key under another id, or another AEAD, opens nothing."""
    key = PrivateKey(9, Kem.X25519, KEYS[1]._secret)
    sealed = bytearray(seal_request(KEYS[1].config, b"a prompt")[0])
    sealed[0] = 9
    with pytest.raises(errors.OpenError):
        open_request({9: key}, bytes(sealed))


def test_an_algorithm_that_the_configuration_does_not_offer_is_refused_on_both_sides() -> None:
    secret = KEYS[1]._secret
    only = PrivateKey(1, Kem.X25519, secret, ((Kdf.HKDF_SHA256, Aead.AES_128_GCM),))
    with pytest.raises(errors.UnsupportedSuite):
        seal_request(only.config, b"a prompt", SUITES[1])
    with pytest.raises(errors.UnsupportedSuite):
        seal_request(KEYS[2].config, b"a prompt", SUITES[0])
    sealed = seal_request(KEYS[1].config, b"a prompt", SUITES[1])[0]
    with pytest.raises(errors.UnsupportedSuite):
        open_request({1: only}, sealed)


# Limits


@pytest.mark.parametrize("length", ["ffffffffffffffff", "c000000000004011", "80004011"])
def test_a_length_above_the_limit_is_refused_at_once(length: str) -> None:
    sealer, opener = exchange()
    with pytest.raises(errors.MessageTooLarge):
        opener.feed(sealer.seal(b"") + bytes.fromhex(length))
    request = RequestOpener(KEYS)
    with pytest.raises(errors.MessageTooLarge):
        request.feed(RequestSealer(KEYS[1].config).seal(b"") + bytes.fromhex(length))


def test_a_final_chunk_above_the_limit_is_refused_before_it_has_ended() -> None:
    sealer, opener = exchange()
    opener.feed(sealer.seal(b"") + b"\x00" + bytes(MAX_CHUNK + TAG))
    with pytest.raises(errors.MessageTooLarge):
        opener.feed(b"\x00")


@pytest.mark.parametrize("length", [1, TAG])
def test_an_empty_record_is_refused(length: int) -> None:
    sealer, opener = exchange()
    with pytest.raises(errors.InvalidMessage):
        opener.feed(sealer.seal(b"") + bytes([length]) + bytes(length))


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


def test_the_largest_request_passes() -> None:
    chunks = MAX_SEALED_REQUEST // (4 + MAX_CHUNK + TAG)
    plaintext = bytes(chunks * MAX_CHUNK)
    sealed = seal_request(KEYS[2].config, plaintext)[0]
    assert MAX_SEALED_REQUEST - 2 * MAX_CHUNK < len(sealed) <= MAX_SEALED_REQUEST
    assert open_request(KEYS, sealed)[0] == plaintext


def test_a_request_of_too_many_chunks_is_refused_by_both_sides() -> None:
    sealer = RequestSealer(KEYS[1].config)
    sealed = b"".join(sealer.seal(b"x") for _ in range(MAX_REQUEST_CHUNKS - 1))
    with pytest.raises(errors.MessageTooLarge):
        sealer.seal(b"x")
    opener = RequestOpener(KEYS)
    opener.feed(sealed)
    with pytest.raises(errors.MessageTooLarge):
        opener.feed(bytes([TAG + 1]) + bytes(TAG + 1))


# One use


def test_a_request_is_sealed_once() -> None:
    sealer = RequestSealer(KEYS[1].config)
    sealer.finish(b"a prompt")
    for again in (sealer.finish, lambda: sealer.seal(b"more")):
        with pytest.raises(errors.AlreadyUsedError):
            again()


def test_a_request_is_answered_once_and_only_when_it_has_opened() -> None:
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    opener = RequestOpener(KEYS)
    for before in (b"", sealed):
        opener.feed(before)
        with pytest.raises(errors.UsageError, match="not opened to its end"):
            opener.response_sealer()
    opener.close()
    sealer = opener.response_sealer()
    with pytest.raises(errors.AlreadyUsedError):
        opener.response_sealer()
    with pytest.raises(errors.AlreadyUsedError):
        opener.feed(b"")
    with pytest.raises(errors.AlreadyUsedError):
        opener.close()
    sealer.finish(b"an answer")
    for again in (sealer.finish, lambda: sealer.seal(b"more")):
        with pytest.raises(errors.AlreadyUsedError):
            again()


def test_a_request_that_did_not_open_cannot_be_answered() -> None:
    sealed = seal_request(KEYS[1].config, b"a prompt")[0]
    for keys, body in (({}, sealed), (KEYS, sealed[:-1] + b"\x00")):
        opener = RequestOpener(keys)
        with pytest.raises(BROKEN):
            opener.feed(body)
            opener.close()
        with pytest.raises(errors.UsageError, match="not opened to its end"):
            opener.response_sealer()
        with pytest.raises(errors.AlreadyUsedError):
            opener.feed(b"")


def test_a_response_is_read_once() -> None:
    sealer, opener = exchange()
    read(opener, sealer.finish(b"answer"))
    for again in (opener.close, lambda: opener.feed(b"")):
        with pytest.raises(errors.AlreadyUsedError):
            again()


def test_nothing_opens_after_an_error() -> None:
    sealer, opener = exchange()
    good, other = sealer.seal(b"one"), sealer.seal(b"two")
    with pytest.raises(errors.OpenError):
        opener.feed(good[:32] + other)
    with pytest.raises(errors.AlreadyUsedError):
        opener.feed(good[32:])
    assert not opener.complete


# Private keys


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.config.kem.label)
def test_a_private_key_survives_storage_and_shows_nothing(key: PrivateKey) -> None:
    stored = key.to_bytes()
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


def test_a_private_key_keeps_a_copy_of_its_own() -> None:
    secret = bytearray(os.urandom(32))
    key = PrivateKey(1, Kem.XWING, secret)
    stored = key.to_bytes()
    overwrite(secret)
    assert secret == bytes(32)
    assert key.to_bytes() == stored


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
