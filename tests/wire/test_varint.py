"""QUIC's variable-length integers, with the examples of RFC 9000 appendix A.1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre import errors
from lacre.wire import varint


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("c2197c5eff14e88c", 151_288_809_941_952_652),
        ("9d7f3e7d", 494_878_333),
        ("7bbd", 15_293),
        ("25", 37),
    ],
)
def test_rfc_9000_examples(encoded: str, value: int) -> None:
    assert varint.encode(value).hex() == encoded
    assert varint.decode(bytes.fromhex(encoded), 0) == (value, len(encoded) // 2)


def test_a_longer_form_is_read_and_never_written() -> None:
    assert varint.decode(bytes.fromhex("4025"), 0) == (37, 2)
    assert varint.decode(bytes.fromhex("c000000000000025"), 0) == (37, 8)


@given(st.integers(0, varint.MAX), st.binary(max_size=4), st.binary(max_size=4))
def test_round_trip_anywhere_in_a_buffer(value: int, before: bytes, after: bytes) -> None:
    encoded = varint.encode(value)
    assert len(encoded) in (1, 2, 4, 8)
    assert varint.decode(before + encoded + after, len(before)) == (value, len(before) + len(encoded))
    for cut in range(len(encoded)):
        assert varint.decode(before + encoded[:cut], len(before)) is None


@pytest.mark.parametrize("value", [0, 63, 64, 16383, 16384, 2**30 - 1, 2**30, varint.MAX])
def test_encoding_is_the_shortest(value: int) -> None:
    lengths = {63: 1, 16383: 2, 2**30 - 1: 4, varint.MAX: 8}
    assert len(varint.encode(value)) == next(length for limit, length in lengths.items() if value <= limit)


@pytest.mark.parametrize("value", [-1, varint.MAX + 1])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(errors.UsageError):
        varint.encode(value)
