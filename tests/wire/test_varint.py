"""QUIC's variable-length integers, with the examples of RFC 9000 appendix A.1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre import errors
from lacre.wire import varint


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
