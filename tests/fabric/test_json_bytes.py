"""JSON by orjson gives what the SDK's own reader and writer give, and refuses what they refuse."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from lacre.errors import InvalidMessage, UsageError
from lacre.jose import jws
from lacre.runtime.json_objects import parse_object
from lacre_fabric.native.json_bytes import read_object, write, write_object

scalars = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(),
    some.integers(-(2**65), 2**65),
    some.floats(allow_nan=False, allow_infinity=False),
    some.text(),
)
values = some.recursive(
    scalars, lambda inner: some.one_of(some.lists(inner), some.dictionaries(some.text(), inner)), max_leaves=12
)
objects = some.dictionaries(some.text(), values, max_size=6)


def same(left: Any, right: Any) -> bool:
    """Equal, and of one type: 1 is not 1.0, and NaN is NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


def read_by_both(data: bytes) -> None:
    try:
        wanted = parse_object(data, "it")
    except InvalidMessage as refused:
        with pytest.raises(InvalidMessage) as also:
            read_object(data, "it")
        assert str(also.value) == str(refused)
    else:
        assert same(read_object(data, "it"), wanted)


@given(objects)
def test_reads_what_the_standard_library_writes(members: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        read_by_both(json.dumps(members, ensure_ascii=ascii_only).encode())


TEXTS = [
    b"", b"{", b"[]", b"1", b"null", b'"x"', b"{} {}", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}',
    b'{"a":-0}', b'{"a":-0.0}', b'{"a":01}', b'{"a":1.}', b'{"a":"\\ud800"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xff"}',
    b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"), b'{"a":"\t"}', b'{"a":"\x7f"}',
    b'{"a":"\\u0000"}', b'{"a":18446744073709551615}', b'{"a":18446744073709551616}', b'{"a":9223372036854775808}',
    b'{"a":-9223372036854775808}', b'{"a":-9223372036854775809}', b'{"a":%d}' % 10**400, b'{"a":%s}' % (b"1" * 5000),
    b'{"a":0.1234567890123456789012}', b'{"a":1e22}', b'{"a":%s1%s}' % (b"[" * 100, b"]" * 100),
    b'{"a":%s1%s}' % (b"[" * 100_000, b"]" * 100_000), b'{"a":1,}', b"{'a':1}", b'{"a":1}//', b'\x00{"a":1}', b'{"a":1}\n ',
]  # fmt: skip


@pytest.mark.parametrize("data", TEXTS)
def test_odd_texts(data: bytes) -> None:
    read_by_both(data)


@given(some.binary(max_size=40))
@example(b'{"":{"":99999999999999999999}}')
def test_any_bytes(data: bytes) -> None:
    read_by_both(data)
    read_by_both(b'{"a":' + data + b"}")


@given(some.integers(0, 10**30))
def test_a_large_count_stays_an_integer(number: int) -> None:
    """As floating point, a receipt's count would not count as one, and an older receipt would settle the request."""
    assert same(read_object(b'{"a":%d}' % number, "it"), {"a": number})


@given(objects)
def test_what_is_written_reads_back(members: dict[str, Any]) -> None:
    assert same(parse_object(write_object(members), "it"), parse_object(jws.written(members), "it"))


def test_it_is_utf_8_without_spaces() -> None:
    class Word(StrEnum):
        A = "b"

    members = {"a": ("é", "🙂", "\x7f"), "b": [1, 2.5, True, None], "c": Word.A, "d": 2**70, "e": 1796002343.983}
    text = '{"a":["é","🙂","\x7f"],"b":[1,2.5,true,null],"c":"b","d":1180591620717411303424,"e":1796002343.983}'
    assert write_object(members) == text.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "\ud800", ["\udfff"], {"\ud800": 1}])
def test_what_has_no_form_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        write_object({"a": value})
    if not isinstance(value, float):
        with pytest.raises(UsageError):
            write(value)
