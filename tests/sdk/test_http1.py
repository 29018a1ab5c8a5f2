"""Requests as a server reads them: what is bounded, what is refused because it has two readings, and where a message ends."""

from __future__ import annotations

import pytest

from lacre.runtime.http1 import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_TARGET,
    Body,
    Event,
    RequestEnd,
    RequestHead,
    RequestReader,
    UnreadableRequest,
)  # fmt: skip

GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


def read(data: bytes, size: int | None = None, *, encoded_slashes: bool = False) -> list[Event]:
    """Every event of `data`, fed in pieces of `size` bytes; pieces of a body that follow each other are joined."""
    reader, events = RequestReader(encoded_slashes=encoded_slashes), list[Event]()
    for at in range(0, len(data), size or max(1, len(data))):
        reader.feed(data[at : at + (size or len(data))])
        while (event := reader.next()) is not None:
            if isinstance(event, Body) and events and isinstance(last := events[-1], Body):
                events[-1] = Body(last.content + event.content)
            else:
                events.append(event)
    return events


def the_head(data: bytes, **options: bool) -> RequestHead:
    [head, _] = read(data, **options)
    assert isinstance(head, RequestHead)
    return head


def status(data: bytes) -> int:
    """What is answered; and it is the same however the bytes come."""
    with pytest.raises(UnreadableRequest) as whole:
        read(data)
    with pytest.raises(UnreadableRequest) as pieces:
        read(data, 1 if len(data) < 2000 else 1000)
    assert whole.value.status == pieces.value.status
    return whole.value.status


def post(*fields: bytes, body: bytes = b"", line: bytes = b"POST /v1/sealed HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: x", *fields, b"", body])


def get(target: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


@pytest.mark.parametrize("size", [None, 1, 7])
def test_requests_one_after_the_other(size: int | None) -> None:
    data = (
        b"\r\n\r\n" + GET + post(b"Content-Length: 5", b"Expect: 100-Continue", body=b"hello")
        + chunked(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nLacre-Pool: b\r\n\r\n")
        + post(b"Connection: a, CLOSE", line=b"GET / HTTP/1.1")
    )  # fmt: skip
    first, end, second, body, end2, third, body3, end3, last, end4 = read(data, size)
    assert first == RequestHead("GET", b"/v1/models", b"", "1.1", [(b"host", b"x")], 0, keep_alive=True, expects=False)
    assert isinstance(second, RequestHead) and (second.length, second.expects) == (5, True)
    assert (body, body3) == (Body(b"hello"), Body(b"abcde"))
    assert isinstance(third, RequestHead) and third.length is None
    assert third.fields == [(b"host", b"x"), (b"transfer-encoding", b"chunked")], "a trailer is no field of the head"
    assert isinstance(last, RequestHead) and not last.keep_alive
    assert {end, end2, end3, end4} == {RequestEnd()}


def test_a_field_and_its_value() -> None:
    head = the_head(post(b"A:", b"B: \t x y\t ", b"c:\xe9", b"d-e_f.9: :"))
    assert head.fields[1:] == [(b"a", b""), (b"b", b"x y"), (b"c", b"\xe9"), (b"d-e_f.9", b":")]


def test_the_old_version() -> None:
    """Proxies and probes still use it: no Host is needed, and no request follows."""
    head = the_head(b"GET / HTTP/1.0\r\nExpect: x\r\nConnection: keep-alive\r\n\r\n")
    assert (head.version, head.keep_alive, head.expects) == ("1.0", False, False)


NORMAL = [b"/", b"/v1/sealed", b"/a/b%20c", b"/%C3%A9", b"/a.b/...", b"/a:b@c;d=e,f", b"/?a=/../%2e|[{\"'", b"/a/?"]
ODD = [
    b"/v1/se%61led", b"/v1/sealed/.", b"/v1/./sealed", b"/v1/../v1/sealed", b"/v1/..", b"//v1/sealed", b"/v1//sealed",
    b"/v1/sealed//", b"/v1%2Fsealed", b"/v1%2fsealed", b"/v1/%2e%2e/x", b"/v1/%2E/x", b"/v1%5Csealed", b"/v1\\sealed",
    b"/v1/sealed%00", b"/v1/%0d%0a", b"/v1/%7Ex", b"/v1/%c3%a9", b"/v1/%FF", b"/v1/%zz", b"/v1/%4", b"/v1/\xc3\xa9",
    b"/v1/se\x01led", b"/v1/se\x7fled", b"/#x", b"/?#", b"http://x/v1/sealed", b"x:443", b"*", b"v1/sealed", b"",
    b"/v1/sealed?\x00", b"/v1/sealed?\xe9", b"/a b", b"/|", b"/<",
]  # fmt: skip


@pytest.mark.parametrize("target", NORMAL)
def test_a_path_in_its_normal_form(target: bytes) -> None:
    head = the_head(get(target))
    assert head.path + (b"?" if b"?" in target else b"") + head.query == target


@pytest.mark.parametrize("path", ODD)
def test_a_path_that_is_not_in_its_normal_form(path: bytes) -> None:
    assert status(get(path)) == 400


def test_an_encoded_slash_where_one_may_be() -> None:
    assert the_head(get(b"/v1/models/a%2Fb"), encoded_slashes=True).path == b"/v1/models/a%2Fb"
    for path in (b"/v1/..%2Fx", b"/v1/a%2F%2Fb", b"/v1%2F/a"):
        with pytest.raises(UnreadableRequest):
            read(get(path), encoded_slashes=True)


LENGTHS = (b"+4", b"-1", b"1_0", b"4 4", b"0x4", b"4.", b"", b"\xb2", b"9" * 17)
CODED = b"Transfer-Encoding: chunked"
REFUSED: dict[str, tuple[int, list[bytes]]] = {
    "two readings of where a body ends": (400, [
        *(post(b"Content-Length: 4", also) for also in (CODED, b"Content-Length: 4", b"Content-Length: 5")),
        *(post(b"Content-Length: " + value) for value in (*LENGTHS, b"4, 4")),
        post(b"Content-Length:4\x0b"), post(CODED, line=b"POST / HTTP/1.0"),
    ]),
    "a coding that is not known": (501, [
        *(post(b"Transfer-Encoding: " + coding) for coding in (
            b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"xchunked", b"chunked;x=y",
        )),
        post(CODED, CODED), post(CODED, b"Transfer-Encoding: identity"), post(b"Transfer-Encoding:"),
    ]),
    "two readings of where a field ends, or of its name": (400, [post(field) for field in (
        b"Content-Length : 4", b"Content-Length\t: 4", b" Content-Length: 4", b"A: b\r\n folded", b"A: b\r\n\tfolded",
        b"A: b\nContent-Length: 4", b"A: b\rContent-Length: 4", b"A: b\r\r\n", b"A: \x00", b"A: \x7f", b"A\x00: b",
        b"A\xe9: b", b"A[]: b", b": b", b"no colon",
    )]),
    "whom a request is for": (400, [
        b"GET / HTTP/1.1\r\n\r\n", post(b"Host: x"), post(b"Host: y"),
        *(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host for host in (b"a b", b"a/b", b"u@a", b"a,b")),
    ]),
    "a version": (505, [b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n"]),
    "a request line": (400, [
        b"GET /\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\n" + GET,
        *(post(line=line) for line in (
            b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET / HTTP/1.1 ", b"GET / http/1.1",
            b"GET / HTTP/1.10", b"get / HTTP/1.1", b"CONNECT x:443 HTTP/1.1", b"OPTIONS * HTTP/1.1",
        )),
    ]),
    "an expectation": (417, [post(b"Expect: 200-ok"), post(b"Expect: 100-continue", b"Expect: 100-continue")]),
    "a chunk": (400, [chunked(body) for body in (
        b"g\r\n", b"-1\r\n", b"0x1\r\na\r\n", b"1_0\r\n", b" 1\r\na\r\n", b"\r\n", b"000000001\r\na\r\n", b"1 ;x=y\r\na\r\n",
        b"1\r\nab\r\n", b"1\r\na\n\n", b"1;x\ny\r\na\r\n", b"1;" + b"x" * 300, b"1" * 300,
        b"0\r\nTransfer-Encoding: gzip\r\n\r\n", b"0\r\nContent-Length: 4\r\n\r\n", b"0\r\nno colon\r\n\r\n",
        b"0\r\nContent-Length : 4\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 2000, b"0\r\na: " + b"b" * 9000,
        (b"100;" + b"x" * 200 + b"\r\n" + bytes(256) + b"\r\n") * 100, b"1\r\na\r\n" * 5000,
    )]),
    "a long target": (414, [b"GET /" + b"a" * (MAX_HEAD + 10), get(b"/" + b"a" * MAX_TARGET)]),
    "a long head": (431, [
        post(b"a: " + b"b" * MAX_HEAD), post()[:-2] + b"a: " + b"b" * MAX_HEAD, post(*[b"a:b"] * MAX_FIELDS),
        post(*[b"a:b"] * 20_000), b"\r\n" * (MAX_HEAD // 2 + 1),
    ]),
}  # fmt: skip
ROWS = [
    pytest.param(data, expected, id=f"{why} {number}")
    for why, (expected, messages) in REFUSED.items()
    for number, data in enumerate(messages)
]


@pytest.mark.parametrize(("data", "expected"), ROWS)
def test_refused(data: bytes, expected: int) -> None:
    assert status(data) == expected


def test_the_largest_head() -> None:
    fields = [b"a:b"] * (MAX_FIELDS - 1)
    room = MAX_HEAD - len(post(*fields)) + 4 + len(b"a:b")
    assert len(the_head(post(*fields[1:], b"c:" + b"d" * (room - 2))).fields) == MAX_FIELDS


def test_nothing_is_read_twice() -> None:
    """Byte by byte the largest head costs as much as its bytes; their square would take longer than a test may."""
    data = post()[:-2] + b"a: " + b"b" * (MAX_HEAD - 1000)
    reader = RequestReader()
    for at in range(len(data)):
        reader.feed(data[at : at + 1])
        assert reader.next() is None


def test_upgrades_are_ignored() -> None:
    """RFC 9110 section 7.8: the request is answered as what it is, and what follows is the next one."""
    data = post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk", line=b"GET / HTTP/1.1")
    assert [type(event) for event in read(data + GET)] == [RequestHead, RequestEnd, RequestHead, RequestEnd]
