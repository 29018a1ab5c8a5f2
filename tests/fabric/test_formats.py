"""What the fabric writes and reads: whatever was written is read back, and of anything else only a protocol error comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from lacre.errors import Expired, InvalidMessage, InvalidSignature, LacreError, SettingsError
from lacre.evidence.receipts import Receipt
from lacre.jose import jws
from lacre_fabric.nats import orders, protocol, subjects
from lacre_fabric.nats.orders import OrderKeys
from lacre_fabric.nats.protocol import MAX_FIELDS, MAX_HEADERS, MAX_LINE, MAX_SIZE, NatsMessage, ProtocolReader, fields
from lacre_fabric.work import grants
from lacre_fabric.work.frames import MAX_PAYLOAD, Frame, FrameKind
from lacre_fabric.work.grants import MAX_SKEW, Grant
from lacre_fabric.work.presence import MAX_BYTES, Presence

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC = jws.raw_public_key(KEY)
NOW = 1_790_000_000.0

NUMBERS = st.integers(0, 2**53 - 1)  # what a receipt may count
TIMES = st.floats(0, 4e9)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PSEUDONYMS = st.from_regex(r"[A-Za-z0-9_-]{22}", fullmatch=True)
GRANTS = st.builds(
    Grant, TEXT, st.floats(0, NOW), st.floats(NOW + 1, 4e9), TEXT, TEXT, TEXT, TEXT, NUMBERS, NUMBERS,
    st.lists(TEXT, max_size=3).map(tuple), st.tuples(PSEUDONYMS, PSEUDONYMS), TEXT,
)  # fmt: skip
RECEIPTS = st.builds(Receipt, TEXT, TEXT, NUMBERS, NUMBERS, NUMBERS, TIMES, TIMES, st.booleans())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)
GRANT = Grant("id", NOW, NOW + 60, "a", "m1", "chat", "none", 10, 100, (), ("A" * 22, "B" * 22), "x")
RECEIPT = Receipt("x", "sha256:0", 1, 0, 2, NOW, NOW + 1, True)


# Frames


def on_the_wire(headers: Iterable[tuple[str, str]], end: str = "\r\n") -> bytes:
    return "".join(["NATS/1.0\r\n", *(f"{name}: {value}\r\n" for name, value in headers), end]).encode()


HEADERS = {"A": "0" * 32, "S": "0", "K": "data"}
VALUES = (
    st.sampled_from(["0" * 32, "a" * 32, "A" * 32, "0", "7", "00", "data", "beat", "", "data\n", " data", "٣", "f" * 64]) | TEXT
)


MACS = st.just(b"") | st.binary(min_size=32, max_size=32)


@given(
    st.binary(min_size=16, max_size=16), st.integers(0, 10**12 - 1), st.sampled_from(FrameKind), st.binary(max_size=100), MACS
)  # fmt: skip
def test_a_frame_is_read_back(attempt: bytes, sequence: int, kind: FrameKind, payload: bytes, mac: bytes) -> None:
    frame = Frame(attempt.hex(), sequence, kind, payload, mac)
    assert Frame.parse(frame.headers(), payload) == frame
    assert Frame.read(on_the_wire(frame.headers().items()), payload) == frame


@given(
    st.lists(st.tuples(st.sampled_from(["A", "S", "K", "M", "a", "x"]), VALUES), max_size=5),
    st.sampled_from(["\r\n", "", "\n"]),
)
@example([*HEADERS.items()], "\r\n")
@example([*HEADERS.items(), ("K", "usage")], "\r\n")
@example([*HEADERS.items(), ("M", "f" * 64)], "\r\n")
@example([*HEADERS.items(), ("M", "F" * 64)], "\r\n")
@example([("M", "f" * 64), *HEADERS.items()], "\r\n")
@example([("S", "0"), ("A", "0" * 32), ("K", "data")], "\r\n")
@example([("A", "0" * 32), ("S", "٣"), ("K", "data")], "\r\n")
def test_both_readings_of_a_block_agree(headers: list[tuple[str, str]], end: str) -> None:
    """The quick one of the usual form, and the one by fields."""
    block = on_the_wire(headers, end)
    fields = dict(line.split(": ", 1) for line in block.decode().split("\r\n")[1:] if ": " in line)
    try:
        frame = Frame.parse({name: value.strip() for name, value in fields.items()}, b"x")
    except InvalidMessage:
        with pytest.raises(InvalidMessage):
            Frame.read(block, b"x")
    else:
        assert Frame.read(block, b"x") == frame


@given(st.none() | st.dictionaries(st.sampled_from(["A", "S", "K"]) | TEXT, TEXT), st.binary(max_size=20))
def test_no_frame_is_said(headers: dict[str, str] | None, payload: bytes) -> None:
    try:
        frame = Frame.parse(headers, payload)
    except InvalidMessage:
        return
    assert headers is not None
    assert {name: headers[name] for name in frame.headers()} == frame.headers()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("A", ["", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n", "g" * 32]),
        ("S", ["", "-1", "01", "+1", "1.0", "1_0", " 1", "1\n", "٣", "9" * 13]),
        ("K", ["", "DATA", "data ", "end"]),
    ],
)
def test_headers_have_one_form(name: str, values: list[str]) -> None:
    Frame.parse(HEADERS, b"")
    without = {other: text for other, text in HEADERS.items() if other != name}
    for odd in (without, *({**HEADERS, name: value} for value in values)):
        with pytest.raises(InvalidMessage):
            Frame.parse(odd, b"")


@pytest.mark.parametrize("mac", ["", "f" * 63, "f" * 65, "F" * 64, "f" * 64 + "\n", "g" * 64, "٣" * 64])
def test_a_mac_in_another_form_does_not_count(mac: str) -> None:
    """And is no error: the receipt's signature decides."""
    assert Frame.parse({**HEADERS, "M": "f" * 64}, b"").mac == b"\xff" * 32
    assert Frame.parse({**HEADERS, "M": mac}, b"") == Frame.parse(HEADERS, b"")


def test_a_frame_is_no_larger_than_the_credit_and_shows_no_content() -> None:
    Frame.parse(HEADERS, bytes(MAX_PAYLOAD))
    for headers, parse in ((HEADERS, Frame.parse), (on_the_wire(HEADERS.items()), Frame.read)):
        with pytest.raises(InvalidMessage):
            parse(headers, bytes(MAX_PAYLOAD + 1))  # type: ignore[operator]
    assert "secret" not in repr(Frame("0" * 32, 0, FrameKind.DATA, b"secret"))


# Grants and receipts


def grant_of(token: str, now: float = NOW) -> Grant:
    return Grant.verify(token, [PUBLIC], now)


def receipt_of(token: str) -> Receipt:
    return Receipt.verify(token, PUBLIC)


BOTH = pytest.mark.parametrize(
    ("one", "typ", "read"),
    [(GRANT, "lacre-grant+jwt", grant_of), (RECEIPT, "lacre-receipt+jwt", receipt_of)],
    ids=["grant", "receipt"],
)
Read = Callable[[str], Grant | Receipt]


@given(GRANTS | RECEIPTS)
def test_what_is_signed_is_read_back(one: Grant | Receipt) -> None:
    assert (grant_of if isinstance(one, Grant) else receipt_of)(one.sign(KEY)) == one


@BOTH
def test_only_its_own_key_and_type_count(one: Grant | Receipt, typ: str, read: Read) -> None:
    both = {**RECEIPT.members(), **GRANT.members()}
    other = {"lacre-grant+jwt", "lacre-receipt+jwt"} - {typ}
    for token in (one.sign(OTHER_KEY), jws.sign(both, KEY, other.pop())):
        with pytest.raises(InvalidSignature):
            read(token)
    assert read(jws.sign({**one.members(), "more": 1}, KEY, typ)) == one, "unknown members are ignored"


@BOTH
def test_every_member_is_needed(one: Grant | Receipt, typ: str, read: Read) -> None:
    for member in one.members():
        rest = {name: value for name, value in one.members().items() if name != member}
        with pytest.raises(InvalidMessage, match=member):
            read(jws.sign(rest, KEY, typ))


def test_a_grant_has_its_time() -> None:
    token = GRANT.sign(KEY)
    for now in (GRANT.exp - 0.1, GRANT.iat - MAX_SKEW):
        assert grant_of(token, now) == GRANT
    for now in (GRANT.exp, GRANT.exp + 1000, GRANT.iat - MAX_SKEW - 0.1):
        with pytest.raises(Expired):
            grant_of(token, now)


@given(st.sampled_from(sorted(GRANT.members())), JSON)
@example("max_tokens", -1)
@example("max_tokens", True)
@example("max_tokens", 1.0)
@example("exp", float("inf"))
@example("exp", float("nan"))
@example("iat", 10**400)
@example("features", [1])
def test_members_of_another_type(member: str, value: Any) -> None:
    """By the right key: even a gateway cannot make anything but a protocol error escape."""
    try:
        grant = grant_of(jws.sign({**GRANT.members(), member: value}, KEY, grants.TYP))
    except LacreError:
        return
    assert json.loads(json.dumps(grant.members()[member])) == value


@given(st.binary(max_size=60) | TEXT.map(str.encode), st.integers(0, 2))
def test_junk_is_no_grant(junk: bytes, part: int) -> None:
    parts = GRANT.sign(KEY).split(".")
    for text in (junk.decode("latin-1"), ".".join([*parts[:part], junk.decode("latin-1"), *parts[part + 1 :]])):
        for read in (grant_of, receipt_of):
            with pytest.raises(LacreError):
                read(text)


def test_a_grant_names_nobody() -> None:
    assert set(GRANT.members()) == {
        "jti", "iat", "exp", "pool", "model", "action", "shape", "max_tokens", "max_prompt_tokens", "features", "fair", "enc",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fair",
    [None, [], ["A" * 22], ["A" * 22] * 3, ["A" * 21, "B" * 22], ["A" * 22, "a" * 23], ["alice", "acme"], [1, 2], "A" * 44],
)
def test_a_grant_without_two_pseudonyms_is_refused(fair: object) -> None:
    """An old gateway's, too: without them nobody could tell whose turn it is."""
    with pytest.raises(InvalidMessage, match="fair"):
        grant_of(jws.sign({**GRANT.members(), "fair": fair}, KEY, grants.TYP))


# What a gateway tells a running request is proven: nobody else of the pool can say it, however it is sent.


def test_a_proof_is_of_one_order_of_one_request() -> None:
    keys, request = OrderKeys(), "0123456789abcdef" * 2
    key = keys.of("a", request)
    assert key == keys.of("a", request)
    for order in (orders.CANCEL, b"4096"):
        assert orders.proven(key, order, orders.proof(key, order))
    for other in (OrderKeys().of("a", request), keys.of("b", request), keys.of("a", "f" * 32)):
        assert not orders.proven(key, orders.CANCEL, orders.proof(other, orders.CANCEL))
    for given_ in ("", "0" * 32, orders.proof(key, b"4097"), orders.proof(key, orders.CANCEL), "\udcff", "é" * 16):
        assert not orders.proven(key, b"4096", given_)


def test_a_request_without_a_key_takes_orders_without_a_proof() -> None:
    """Its gateway is of an older version."""
    assert orders.parse_key(None) is None
    assert orders.proven(None, orders.CANCEL, "")


@pytest.mark.parametrize("text", ["", "zz" * 16, "00" * 15, "00" * 17, "é"])
def test_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"hex|16 bytes"):
        orders.parse_key(text)


# Subjects


@given(st.text(min_size=1, max_size=60))
@example("*")
@example(">")
@example("a.b c")
@example("\ud800")
@example("modèle/8b:q4_K_M")
def test_a_model_s_name_is_one_token(model: str) -> None:
    if len(model.encode("utf-8", "surrogatepass")) > 180:
        return
    token = subjects.model_token(model)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert subjects.work("a", "eu", model) == f"work.a.eu.{token}"
    assert jws.b64u_decode(token).decode("utf-8", "surrogatepass") == model, "no two models share a queue"
    assert len(subjects.consumer(model)) <= 255


@pytest.mark.parametrize("model", ["", "x" * 181, "é" * 91])
def test_a_model_s_name_has_a_length(model: str) -> None:
    with pytest.raises(SettingsError):
        subjects.model_token(model)


@given(st.text(max_size=70))
@example("a\n")
@example("ａ")
def test_a_name_is_one_plain_token(name: str) -> None:
    plain = re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name, re.ASCII) is not None and len(name) <= 63 and not name.endswith("\n")
    assert subjects.is_name(name) == plain
    if plain:
        assert subjects.check_name("pool", name) == name
    else:
        with pytest.raises(SettingsError, match="pool name"):
            subjects.check_name("pool", name)


# Presence


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 20_000)
@example(b'{"models":[' + b"[" * 20_000)
@example(b'{"models":["' + b"m" * MAX_BYTES + b'"]}')
@example(b"9" * 5000)
def test_presence_that_cannot_be_read_is_none(said: bytes) -> None:
    try:
        present = Presence.parse(said)
    except InvalidMessage:
        return
    assert present.models == frozenset(json.loads(said)["models"])


# What a server sends, taken apart: whatever a peer chose of it, the next message begins where it begins.


# As nats-server lets them through: anything but a space, a tab and the end of a line.
SUBJECT = st.binary(min_size=1, max_size=30).map(lambda raw: raw.translate(None, b" \t\n")).filter(bool)
BLOCK = st.binary(max_size=40)
MESSAGES = st.builds(NatsMessage, st.integers(0, 10**9), SUBJECT, SUBJECT | st.just(b""), BLOCK, st.binary(max_size=40))


def as_sent(message: NatsMessage) -> bytes:
    """As nats-server writes it."""
    words = [message.subject, b"%d" % message.sid, *([message.reply] if message.reply else [])]
    name, size = b"MSG", len(message.payload)
    if message.headers:
        name, size = b"HMSG", size + len(message.headers)
        words.append(b"%d" % len(message.headers))
    return b" ".join([name, *words, b"%d" % size]) + b"\r\n" + message.headers + message.payload + b"\r\n"


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 60) | st.just(2**20))
def test_every_message_comes_as_it_was_sent(messages: list[NatsMessage], step: int) -> None:
    """However it is cut. A subject with a form feed or a lone carriage return names no other subscription."""
    sent = b"PING\r\n" + b"".join(map(as_sent, messages)) + b"PONG\r\n"
    reader = ProtocolReader()
    heard = [event for at in range(0, len(sent), step) for event in reader.feed(sent[at : at + step])]
    assert heard == [protocol.Control(b"PING", b""), *messages, protocol.Control(b"PONG", b"")]


def test_an_empty_reply_subject_is_none() -> None:
    """As nats-server writes its own advisories of JetStream: two spaces side by side."""
    sent = b"MSG $JS.EVENT.ADVISORY.API 1  2\r\n{}\r\nHMSG a 1  3 5\r\nabchi\r\n"
    assert list(ProtocolReader().feed(sent)) == [
        NatsMessage(1, b"$JS.EVENT.ADVISORY.API", b"", b"", b"{}"),
        NatsMessage(1, b"a", b"", b"abc", b"hi"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        *(b"MSG a " + rest + b"\r\n" for rest in (b"1", b"1 r x 5", b"x 5", b" 1 5", b"1 -5", b"1 \xd9\xa1", b"1 2\r\nabc")),
        *(b"MSG a 1 %d\r\n" % size for size in (MAX_SIZE + 1, 10**19 - 1)),
        *(b"HMSG a 1 7 5\r\n", b"HMSG a 1 5\r\n", b"msg a 1 5\r\n", b"\r\n", b"x" * MAX_LINE),
    ],
)
def test_what_the_protocol_does_not_have_is_said_to_be_that(line: bytes) -> None:
    with pytest.raises(protocol.BrokenProtocol):
        list(ProtocolReader().feed(line + b"hello\r\n"))


def test_a_message_too_long_is_dropped_as_it_arrives() -> None:
    reader, size = ProtocolReader(keep=100), 10_000
    heard: list[protocol.Event] = list(reader.feed(b"MSG a 7 %d\r\n" % size))
    for _ in range(10):
        heard += reader.feed(bytes(1000))
        assert len(reader._buffer) == 0
    heard += reader.feed(b"\r\nMSG b 8 2\r\nhi\r\n")
    assert heard == [protocol.Oversized(7, size), NatsMessage(8, b"b", b"", b"", b"hi")]


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: b"NATS/1.0" + raw), st.booleans())
def test_no_header_raises_anything_but_its_own_error(block: bytes, status: bool) -> None:
    try:
        found = fields(block, status=status)
    except InvalidMessage:
        return
    assert all(name.isascii() for name in found)


def test_a_status_is_the_servers_alone() -> None:
    block = b"NATS/1.0 404 No Messages\r\nA: b\r\nStatus: 503\r\nDescription: x\r\n\r\n"
    assert fields(block, status=True) == {"Status": "404", "Description": "No Messages", "A": "b"}
    assert fields(block, status=False) == {"A": "b"}


@pytest.mark.parametrize("line", [b" \xff\xff\xff", b" 100 \xff\xff", b" 10", b" 1000", b"404", b" -10 x"])
def test_a_status_line_that_is_none_says_nothing(line: bytes) -> None:
    assert fields(b"NATS/1.0" + line + b"\r\nA: b\r\n\r\n", status=True) == {"A": "b"}


def test_headers_are_bounded() -> None:
    most = b"NATS/1.0\r\n" + b"".join(b"A%d: b\r\n" % number for number in range(MAX_FIELDS)) + b"\r\n"
    assert len(fields(most, status=False)) == MAX_FIELDS
    with pytest.raises(InvalidMessage, match="more than 64 headers"):
        fields(most[:-2] + b"B: c\r\n\r\n", status=False)
    with pytest.raises(InvalidMessage, match="bytes of headers"):
        fields(b"NATS/1.0\r\nA: " + b"b" * MAX_HEADERS, status=False)
    for block in (b"", b"\r\n", b"x", b"NATS/2.0\r\n\r\n"):
        with pytest.raises(InvalidMessage, match="begin with"):
            fields(block, status=False)
