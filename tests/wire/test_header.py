"""What a relay reads: key configurations, the header of a sealed request, and the outline of its chunks."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.wire import varint
from lacre.wire.header import (
    ALL_ALGORITHMS,
    MAX_KEY_LIST,
    Aead,
    Kdf,
    Kem,
    KeyConfig,
    SealedHeader,
    Suite,
    encode_key_list,
    inspect_request,
    parse_key_list,
)

TAG = 16
CONFIG = KeyConfig(7, Kem.XWING, bytes(1216))
UNKNOWN_KEM = bytes.fromhex("01 1234") + bytes(32) + bytes.fromhex("0004 0001 0001")

key_configs = st.sampled_from(list(Kem)).flatmap(
    lambda kem: st.builds(
        KeyConfig,
        st.integers(0, 255),
        st.just(kem),
        st.binary(min_size=kem.n_pk, max_size=kem.n_pk),
        st.lists(st.sampled_from(ALL_ALGORITHMS), min_size=1, max_size=5).map(tuple),
    )
)


def outline(*lengths: int, kem: Kem = Kem.X25519) -> bytes:
    """A body of the right outline, of chunks that would not open."""
    header = SealedHeader(1, Suite(kem, Kdf.HKDF_SHA256, Aead.AES_128_GCM), bytes(kem.n_enc)).raw
    return header + b"".join(varint.encode(length) + bytes(length) for length in lengths) + bytes(1 + TAG)


def refused(error: type[Exception], parse: Callable[[bytes], object], *inputs: bytes) -> None:
    for data in inputs:
        with pytest.raises(error):
            parse(data)


READS = {"header", "framing", "varint"}  # with these a relay reads a sealed request


@pytest.mark.parametrize("name", sorted(READS))
def test_what_a_relay_reads_with_imports_nothing_that_could_open(name: str) -> None:
    folder = Path(varint.__file__).parent
    imported = re.findall(r"^\s*(?:from|import) [^(\n]*(?:\([^)]*\))?", (folder / f"{name}.py").read_text(), re.MULTILINE)
    words = {word for line in imported for word in re.findall(r"\w+", line)}
    assert not words & {"cryptography", *({path.stem for path in folder.glob("*.py")} - READS)}


def test_the_client_loads_nothing_that_needs_a_private_key() -> None:
    code = "import sys, lacre; print('lacre.wire.opening' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_labels_and_lengths() -> None:
    assert [(kem.label, kem.n_pk, kem.n_enc) for kem in Kem] == [("X25519", 32, 32), ("MLKEM768-X25519", 1216, 1120)]
    assert [(aead.n_key, aead.n_nonce) for aead in Aead] == [(16, 12), (32, 12), (32, 12)]
    assert Suite(Kem.XWING, Kdf.HKDF_SHA256, Aead.AES_256_GCM) == CONFIG.suite()


# Key configurations


@given(st.lists(key_configs, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_key_configurations_round_trip(configs: list[KeyConfig]) -> None:
    assert [KeyConfig.parse(config.encode()) for config in configs] == configs
    encoded = encode_key_list(configs)
    assert list(parse_key_list(encoded)) == configs
    assert encode_key_list(parse_key_list(encoded)) == encoded


def test_a_configuration_cut_anywhere_is_refused() -> None:
    encoded, listed = KeyConfig(1, Kem.X25519, bytes(32)).encode(), encode_key_list([CONFIG])
    cuts = (encoded[:length] for length in range(len(encoded)))
    refused(errors.InvalidMessage, KeyConfig.parse, *cuts, encoded + b"\x00")
    refused(errors.InvalidMessage, parse_key_list, *(listed[:length] for length in (*range(8), len(listed) - 1)))


def test_unknown_algorithms_are_left_out_and_one_is_needed() -> None:
    known = KeyConfig(1, Kem.X25519, bytes(32), ((Kdf.HKDF_SHA256, Aead.AES_128_GCM),)).encode()
    more = known[:-6] + bytes.fromhex("000c 00020001 00010001 0001ffff")
    assert KeyConfig.parse(more) == KeyConfig.parse(known)
    refused(errors.UnsupportedSuite, KeyConfig.parse, known[:-6] + bytes.fromhex("0004 00100001"))  # SHAKE128 has no Expand
    wrong = ("0000", "0003000100", "0005000100010001")
    refused(errors.InvalidMessage, KeyConfig.parse, *(known[:-6] + bytes.fromhex(end) for end in wrong))


def test_a_list_passes_over_unknown_kems_and_needs_one_known() -> None:
    unknown = len(UNKNOWN_KEM).to_bytes(2, "big") + UNKNOWN_KEM
    assert parse_key_list(unknown + encode_key_list([CONFIG])) == (CONFIG,)
    refused(errors.UnsupportedSuite, parse_key_list, unknown)
    refused(errors.InvalidMessage, parse_key_list, b"")
    refused(errors.MessageTooLarge, parse_key_list, bytes(MAX_KEY_LIST + 1))


def test_the_suite_is_the_first_preferred_that_is_offered() -> None:
    offered = tuple((Kdf.HKDF_SHA256, aead) for aead in (Aead.AES_128_GCM, Aead.CHACHA20_POLY1305))
    config = KeyConfig(1, Kem.X25519, bytes(32), offered)
    assert config.suite().aead is Aead.CHACHA20_POLY1305
    assert config.suite([Aead.AES_128_GCM]).aead is Aead.AES_128_GCM
    with pytest.raises(errors.UnsupportedSuite):
        config.suite([Aead.AES_256_GCM])
    assert config.offers(config.suite())
    assert not config.offers(Suite(Kem.XWING, Kdf.HKDF_SHA256, Aead.AES_128_GCM))


@pytest.mark.parametrize(
    "arguments",
    [(256, Kem.X25519, bytes(32)), (-1, Kem.X25519, bytes(32)), (1, Kem.XWING, bytes(32)), (1, Kem.X25519, bytes(32), ())],
    ids=["key id above a byte", "negative key id", "key of another KEM", "no algorithms"],
)
def test_an_impossible_configuration_cannot_be_made(arguments: tuple[int, Kem, bytes]) -> None:
    with pytest.raises(errors.UsageError):
        KeyConfig(*arguments)


# The header


@pytest.mark.parametrize("kem", list(Kem))
def test_the_header_and_its_digest(kem: Kem) -> None:
    body = outline(100, kem=kem)
    header = inspect_request(body)
    assert header.raw == body[: 7 + kem.n_enc]
    assert header.digest == hashlib.sha256(body[: 7 + kem.n_enc]).digest()
    assert header == SealedHeader.parse(body)
    refused(errors.TruncatedStream, SealedHeader.parse, *(body[:length] for length in range(7 + kem.n_enc)))


@pytest.mark.parametrize("identifiers", ["01 0021 0001 0001", "01 0020 0010 0001", "01 0020 0001 ffff", "01 0020 0003 0001"])
def test_an_unknown_suite_is_refused_by_its_first_bytes(identifiers: str) -> None:
    refused(errors.UnsupportedSuite, SealedHeader.parse, bytes.fromhex(identifiers))


# The outline; what is wrong with one: `test_ohttp`


def test_longer_forms_of_a_length_are_legal() -> None:
    header = outline()[: 7 + 32]
    inspect_request(header + bytes.fromhex("c000000000000011") + bytes(17) + bytes.fromhex("4000") + bytes(16))


@given(st.binary(max_size=200), st.sampled_from([b"", outline()[:7], outline()[:39], outline()[:40], outline(20, 20)]))
@settings(deadline=None)
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes, start: bytes) -> None:
    for parse in (KeyConfig.parse, parse_key_list, SealedHeader.parse, inspect_request):
        try:
            parse(start + data)
        except errors.ProtocolError:
            continue


# Lengths: QUIC's integers, with the examples of RFC 9000 appendix A.1


@pytest.mark.parametrize(
    ("encoded", "value", "shortest"),
    [
        ("c2197c5eff14e88c", 151_288_809_941_952_652, True), ("9d7f3e7d", 494_878_333, True), ("7bbd", 15_293, True),
        ("25", 37, True), ("4025", 37, False), ("c000000000000025", 37, False),
    ],
)  # fmt: skip
def test_rfc_9000_examples(encoded: str, value: int, shortest: bool) -> None:
    """A longer form is read and never written."""
    assert (varint.encode(value).hex() == encoded) is shortest
    assert varint.decode(bytes.fromhex(encoded), 0) == (value, len(encoded) // 2)


@given(st.integers(0, varint.MAX), st.binary(max_size=4), st.binary(max_size=4))
def test_round_trip_anywhere_in_a_buffer(value: int, before: bytes, after: bytes) -> None:
    encoded = varint.encode(value)
    assert len(encoded) in (1, 2, 4, 8)
    assert varint.decode(before + encoded + after, len(before)) == (value, len(before) + len(encoded))
    for cut in range(len(encoded)):
        assert varint.decode(before + encoded[:cut], len(before)) is None


@pytest.mark.parametrize(
    ("value", "length"),
    [(0, 1), (63, 1), (64, 2), (16383, 2), (16384, 4), (2**30 - 1, 4), (2**30, 8), (varint.MAX, 8)],
)
def test_encoding_is_the_shortest(value: int, length: int) -> None:
    assert len(varint.encode(value)) == length


@pytest.mark.parametrize("value", [-1, varint.MAX + 1])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(errors.UsageError):
        varint.encode(value)
