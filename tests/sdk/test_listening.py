"""The SDK's own server, over real sockets and without: which requests it reads, for whom, and how long it waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from lacre.asgi import App, Receive, Send
from lacre.cli.proxy import listening as listening_at
from lacre.errors import SettingsError
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
from lacre.runtime.listening import AHEAD, DISCARDED, BoundedConfig, BoundedProtocol, Door, network_of
from lacre.runtime.served_hosts import Hosts, as_origin, base_url

ASKED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
pytestmark = pytest.mark.timeout(30)  # a server that waits where it should not


async def reply(send: Send, body: bytes = b"ok") -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def deaf(_scope: Any, _receive: Receive, send: Send) -> None:
    """Answers without a look at the body."""
    await reply(send)


async def reading(_scope: Any, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await reply(send, str(size).encode())


@dataclass(frozen=True)
class Served:
    server: uvicorn.Server
    port: int
    door: Door

    async def dial(self, said: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(said)
        return reader, writer

    async def whole(self, said: bytes) -> bytes:
        """All that comes back until the server ends the connection."""
        reader, writer = await self.dial(said)
        told = await reader.read()
        writer.close()
        return told


@contextlib.asynccontextmanager
async def served(app: App, **door: Any) -> AsyncIterator[Served]:
    entrance = Door(**door)
    config = BoundedConfig(app, entrance, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    loop = asyncio.get_running_loop()

    def connection() -> BoundedProtocol:
        return BoundedProtocol(config, server.server_state, {}, loop)

    listener = await loop.create_server(connection, "127.0.0.1", 0)
    try:
        yield Served(server, listener.sockets[0].getsockname()[1], entrance)
    finally:
        for each in list(server.server_state.connections):
            each.transport.abort()  # type: ignore[union-attr]
        listener.close()
        await listener.wait_closed()
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 300000\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n493e0\r\n%b\r\n0\r\n\r\n"]
)
async def test_a_long_body_and_the_next_request(framing: bytes) -> None:
    async with served(reading) as at:
        said = b"POST / HTTP/1.1\r\nHost: x\r\n" + framing.replace(b"%b", bytes(300_000))
        told = await at.whole(said + said + ASKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert [part.rpartition(b"\r\n")[2] for part in told.split(b"HTTP/1.1 ")[1:]] == [b"300000", b"300000", b"0"]


async def test_what_nobody_asks_for_yet_stays_in_the_network() -> None:
    """A body before its app reads it; and the requests behind one under way."""
    asked, size = asyncio.Event(), 8 * 2**20

    async def app(_scope: Any, receive: Receive, send: Send) -> None:
        await asked.wait()
        await reading(_scope, receive, send)

    async with served(app) as at:
        reader, writer = await at.dial(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
        writer.write(bytes(size))
        assert 0 < await most_held(at) < 2**19
        asked.set()
        assert (await reader.read()).endswith(b"\r\n\r\n8388608")
        assert at.door.held_now == 0
        writer.close()
        asked.clear()
        _reader, writer = await at.dial(ASKED * (4 * 2**20 // len(ASKED)))
        assert await most_held(at) <= AHEAD + 2**18
        assert len(at.server.server_state.tasks) == 1
        writer.transport.abort()
        asked.set()


async def most_held(at: Served) -> int:
    """Within a while."""
    most = 0
    for _ in range(50):
        await asyncio.sleep(0.002)
        most = max(most, at.door.held_now)
    return most


async def test_a_body_that_is_not_read_has_an_end() -> None:
    """The answer is there at once, and a client that goes on sending is cut off."""
    async with served(deaf) as at:
        reader, writer = await at.dial(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * DISCARDED:
                writer.write(bytes(65536))
                await writer.drain()
                sent += 65536
        assert sent < 64 * DISCARDED
        writer.transport.abort()


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_an_answer_that_nobody_reads(close: bytes) -> None:
    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        await reply(send, bytes(32 * 2**20))

    async with served(app, stalled=0.3) as at:
        reader, writer = await at.dial(b"GET / HTTP/1.1\r\nHost: x\r\n" + close + b"\r\n")
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        for there in (True, False):
            while bool(at.server.server_state.connections) is not there:
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_upgrades_are_answered_as_what_they_are() -> None:
    upgrade = ASKED.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    async with served(deaf) as at:
        told = await at.whole(upgrade + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200 OK") and b"HTTP/1.1 505 " in told


async def test_an_error_behind_a_request_under_way_does_not_answer_it() -> None:
    """Nobody may take a bare status for the answer that is still to come."""
    done = asyncio.Event()

    async def app(_scope: Any, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        done.set()

    async with served(app) as at:
        assert await at.whole(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n") == b""
        await done.wait()


def test_whom_an_address_stands_for() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff%eth0") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("no address") == "no address"


async def test_a_trusted_proxy_has_no_limit_of_its_own() -> None:
    async with served(deaf, per_address=1, free=("127.0.0.0/8",)) as at:
        crowd = [await at.dial(ASKED) for _ in range(5)]
        for reader, writer in crowd:
            assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
            writer.close()
        assert at.door.cut == 0


# Requests as a server reads them: what is bounded, what has two readings, and where a message ends.

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


# Which `Host` means this machine: what a program may write into a base URL, and what a web page could make of it.

PRINTED = {
    "127.0.0.1": "http://127.0.0.1:8080/v1",
    "127.0.0.2": "http://127.0.0.2:8080/v1",
    "LocalHost": "http://localhost:8080/v1",
    "0.0.0.0": "http://127.0.0.1:8080/v1",
    "192.0.2.7": "http://192.0.2.7:8080/v1",
    "::1": "http://[::1]:8080/v1",
    "0:0:0:0:0:0:0:1": "http://[::1]:8080/v1",
    "::": "http://[::1]:8080/v1",
    "FE80::1%eth0": "http://[fe80::1]:8080/v1",
}


@pytest.mark.parametrize(("listening", "url"), PRINTED.items())
def test_what_is_printed_is_answered(listening: str, url: str) -> None:
    assert base_url(listening, 8080) == url
    assert Hosts.of(listening, 8080).know(url.removeprefix("http://").removesuffix("/v1"))


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "localhost.", "127.0.0.1:", "localhost:80", "box", "BOX:80"]
)
def test_port_80_need_not_be_written(host: str) -> None:
    assert Hosts.of("127.0.0.1", 80, ["Box"]).know(host)


ANOTHER = ["localhost", "127.0.0.1", "localhost:80", "localhost:8081", "localhost:08080x", "192.0.2.7:8080"]
NO_HOST = [
    *("", ":8080", "evil.example:8080", "127.1:8080", "0x7f.0.0.1:8080", "2130706433:8080", "a@localhost:8080"),
    *("localhost:8080/x", "localhost:8080,evil.example", "[127.0.0.1]x:8080", "[::1]]:8080", "[]:8080"),
    *("löcalhost:8080", "localhost :8080"),
]


ELSEWHERE = [("127.0.0.1", host) for host in (*ANOTHER, *NO_HOST)] + [("0.0.0.0", host) for host in NO_HOST]


@pytest.mark.parametrize(("listening", "host"), ELSEWHERE)
def test_what_is_no_host_of_this_server(listening: str, host: str) -> None:
    assert not Hosts.of(listening, 8080).know(host)


def test_a_name_with_a_port_of_its_own() -> None:
    """As through a tunnel."""
    hosts = Hosts.of("127.0.0.1", 8080, ["box.lan:9000", "other.lan"])
    assert hosts.know("box.lan:9000") and hosts.know("other.lan:8080")
    assert not hosts.know("box.lan:8080") and not hosts.know("other.lan:9000")
    assert "box.lan:9000" in str(hosts) and "other.lan:8080" in str(hosts)


@pytest.mark.parametrize("name", ["", "two words", "http://box", "box/x", "[::1", "ü"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(SettingsError, match="is not a host"):
        Hosts.of("127.0.0.1", 8080, [name])


@given(st.text(max_size=40))
def test_no_text_does_anything_but_yes_or_no(text: str) -> None:
    assert Hosts.of("0.0.0.0", 8080).know(text) in (True, False)


SENT = {
    "http://localhost:3000": "http://localhost:3000", "http://localhost:3000/": "http://localhost:3000",
    "HTTPS://App.Example": "https://app.example", "https://app.example:443/": "https://app.example",
    "http://app.example:443": "http://app.example:443", "http://[::1]:80": "http://[::1]",
    "chrome-extension://abcdef": "chrome-extension://abcdef", "null": "null",
}  # fmt: skip


@pytest.mark.parametrize(("written", "sent"), SENT.items())
def test_an_origin_is_what_a_browser_sends(written: str, sent: str) -> None:
    assert as_origin(written) == sent


@pytest.mark.parametrize(
    "written",
    ["", "*", "localhost", "localhost:3000", "http://", "http://a/b", "http://a?b", "http://u@a", "http://é", "http://[::g]"],
)
def test_an_origin_that_no_browser_sends(written: str) -> None:
    with pytest.raises(SettingsError, match="is not the origin"):
        as_origin(written)


def test_a_port_in_use_is_said_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            SettingsError, match=rf"port {port} of 127.0.0.1 is not available \(Address already in use\): choose"
        ):
            listening_at("127.0.0.1", port)
