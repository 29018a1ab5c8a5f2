"""Binary HTTP: the examples of RFC 9292, the rules for what is invalid, and the limits."""

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.wire.bhttp import (
    Data,
    End,
    Event,
    Request,
    ResponseDecoder,
    ResponseEncoder,
    ResponseHead,
    decode_request,
    encode_request,
    encode_request_indeterminate,
)

GET = Request("GET", "https", "example.com", "/")
CONTROL = bytes.fromhex("03474554056874747073 0b6578616d706c652e636f6d 012f")
BROKEN = errors.ProtocolError


def read(*pieces: bytes) -> list[Event]:
    decoder = ResponseDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return joined(events + decoder.close())


def joined(events: list[Event]) -> list[Event]:
    """Pieces of content next to each other, as one: where they are cut means nothing."""
    result: list[Event] = []
    for event in events:
        match result, event:
            case [*_, Data(before)], Data(after):
                result[-1] = Data(before + after)
            case _:
                result.append(event)
    return result


def written(*steps: Event) -> bytes:
    encoder = ResponseEncoder()
    out = []
    for step in steps:
        match step:
            case ResponseHead(informational=True):
                out.append(encoder.informational(step.status, step.headers))
            case ResponseHead():
                out.append(encoder.head(step.status, step.headers))
            case Data():
                out.append(encoder.data(step.content))
            case End():
                out.append(encoder.end(step.trailers))
    return b"".join(out)


# RFC 9292 section 5

RFC_REQUEST = Request(
    "GET",
    "https",
    "",
    "/hello.txt",
    (
        ("user-agent", "curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"),
        ("host", "www.example.com"),
        ("accept-language", "en, mi"),
    ),
)
KNOWN_REQUEST = bytes.fromhex(
    "00034745540568747470 73000a2f68656c6c6f2e747874406c0a757365722d6167656e74346375726c2f372e31362e33206c6962"
    "6375726c2f372e31362e33204f70656e53534c2f302e392e376c207a6c69622f312e322e3304686f73740f7777772e6578616d70"
    "6c652e636f6d0f6163636570742d6c616e677561676506656e2c206d690000"
)
INDETERMINATE_REQUEST = bytes.fromhex(
    "02034745540568747470 73000a2f68656c6c6f2e7478740a757365722d6167656e74346375726c2f372e31362e33206c6962"
    "6375726c2f372e31362e33204f70656e53534c2f302e392e376c207a6c69622f312e322e3304686f73740f7777772e6578616d70"
    "6c652e636f6d0f6163636570742d6c616e677561676506656e2c206d6900000000000000000000000000"
)
INDETERMINATE_RESPONSE = bytes.fromhex(
    "0340660772756e6e696e670a22736c6565702031352200406704 6c696e6b233c2f7374796c652e6373733e3b2072656c3d707265"
    "6c6f61643b2061733d7374796c65046c696e6b243c2f7363726970742e6a733e3b2072656c3d7072656c6f61643b2061733d7363"
    "726970740040c80464617465 1d4d6f6e2c203237204a756c20323030392031323a32383a353320474d5406736572766572064170"
    "616368650d6c6173742d6d6f6469666965641d5765642c203232204a756c20323030392031393a31353a353620474d5404657461"
    "67142233346161333837 2d642d3135363865623030220d6163636570742d72616e676573056279746573 0e636f6e74656e742d6c"
    "656e677468023531047661 72790f4163636570742d456e636f64696e670c636f6e74656e742d747970650a746578742f706c6169"
    "6e003348656c6c6f20576f726c6421204d7920636f6e74656e7420696e636c7564657320612074726169 6c696e672043524c462e"
    "0d0a0000"
)
KNOWN_RESPONSE = bytes.fromhex(
    "0140c8001d5468697320636f6e74656e7420636f6e7461696e732043524c462e0d0a0d07747261696c65720474657874"
)


def test_rfc_known_length_request() -> None:
    assert decode_request(KNOWN_REQUEST) == RFC_REQUEST
    assert encode_request(RFC_REQUEST) == KNOWN_REQUEST
    for shorter in (KNOWN_REQUEST[:-1], KNOWN_REQUEST[:-2]):
        assert decode_request(shorter) == RFC_REQUEST


def test_rfc_indeterminate_length_request() -> None:
    """With ten bytes of padding; "anything up to 12 bytes can be removed from this message"."""
    assert encode_request_indeterminate(RFC_REQUEST, padded_to=len(INDETERMINATE_REQUEST)) == INDETERMINATE_REQUEST
    for removed in range(13):
        assert decode_request(INDETERMINATE_REQUEST[: len(INDETERMINATE_REQUEST) - removed]) == RFC_REQUEST
    with pytest.raises(errors.TruncatedStream):
        decode_request(INDETERMINATE_REQUEST[:-13])


def test_rfc_response_with_interim_responses() -> None:
    events = read(INDETERMINATE_RESPONSE)
    links = (
        ("link", "</style.css>; rel=preload; as=style"),
        ("link", "</script.js>; rel=preload; as=script"),
    )
    assert events[:2] == [
        ResponseHead(102, (("running", '"sleep 15"'),), informational=True),
        ResponseHead(103, links, informational=True),
    ]
    head = events[2]
    assert isinstance(head, ResponseHead) and head.status == 200 and not head.informational
    assert dict(head.headers)["last-modified"] == "Wed, 22 Jul 2009 19:15:56 GMT" and len(head.headers) == 8
    assert events[3:] == [Data(b"Hello World! My content includes a trailing CRLF.\r\n"), End()]
    assert written(*events) == INDETERMINATE_RESPONSE


def test_rfc_known_length_response_with_trailers() -> None:
    assert read(KNOWN_RESPONSE) == [
        ResponseHead(200, ()),
        Data(b"This content contains CRLF.\r\n"),
        End((("trailer", "text"),)),
    ]


def test_rfc_messages_read_byte_by_byte() -> None:
    for message in (INDETERMINATE_RESPONSE, KNOWN_RESPONSE, bytes.fromhex("0140c8")):
        assert read(*(bytes([byte]) for byte in message)) == read(message)


def test_the_shortest_messages() -> None:
    """Section 3.8: empty sections at the end may be left out."""
    for control in (b"\x00", b"\x02"):
        assert decode_request(control + CONTROL) == GET
    for framing in (b"\x01", b"\x03"):
        assert read(framing + bytes.fromhex("40c8")) == [ResponseHead(200, ()), End()]
        assert read(framing + bytes.fromhex("40c800")) == [ResponseHead(200, ()), End()]
        assert read(framing + bytes.fromhex("40c8000000")) == [ResponseHead(200, ()), End()]


def test_events_come_as_soon_as_they_are_complete() -> None:
    encoder, decoder = ResponseEncoder(), ResponseDecoder()
    assert decoder.feed(encoder.informational(103)) == [ResponseHead(103, (), informational=True)]
    assert decoder.feed(encoder.head(200, [("Content-Type", "text/event-stream")])) == [
        ResponseHead(200, (("content-type", "text/event-stream"),))
    ]
    piece = encoder.data(b"data: sea\n\n")
    assert decoder.feed(piece[:5]) == [Data(b"data")]
    assert decoder.feed(piece[5:]) == [Data(b": sea\n\n")]
    assert decoder.feed(encoder.data(b"")) == []
    assert decoder.feed(encoder.end([("lacre-receipt", "x.y.z")])) == [End((("lacre-receipt", "x.y.z"),))]
    assert decoder.feed(bytes(10)) == []
    assert decoder.close() == []


# Properties

# Fields with rules of their own; those are tested beside what is invalid.
RULED = ("content-length", "te", "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade")
tokens = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_!#$%&'*+.^`|~", min_size=1, max_size=20).filter(
    lambda name: name not in RULED
)
values = st.text([chr(code) for code in (*range(0x20, 0x7F), *range(0x80, 0x100))], max_size=30).map(
    lambda text: text.strip(" ")
)
fields = st.lists(st.tuples(tokens, values), max_size=5).map(tuple)
requests = st.builds(
    Request,
    st.sampled_from(["GET", "POST", "DELETE", "M-SEARCH"]),
    st.sampled_from(["https", "http"]),
    st.sampled_from(["", "lacre.invalid", "[::1]:8080", "a.example:443"]),
    st.text("abc/?&=%20~;", max_size=20).map("/".__add__) | st.just("*"),
    fields,
    st.binary(max_size=200),
    fields,
)
heads = st.builds(ResponseHead, st.integers(200, 599), fields)
informational = st.builds(ResponseHead, st.sampled_from([100, 102, 103, 199]), fields, st.just(True))
pieces = st.builds(Data, st.binary(max_size=60))
responses = st.tuples(st.lists(informational, max_size=3), heads, st.lists(pieces, max_size=5), st.builds(End, fields)).map(
    lambda parts: [*parts[0], parts[1], *parts[2], parts[3]]
)


@given(requests, st.integers(0, 300))
@settings(max_examples=250, deadline=None)
def test_requests_round_trip_in_both_forms(request_: Request, padding: int) -> None:
    for encode in (encode_request, encode_request_indeterminate):
        encoded = encode(request_)
        assert decode_request(encoded) == request_
        padded = encode(request_, padded_to=len(encoded) + padding)
        assert padded == encoded + bytes(padding)
        assert decode_request(padded) == request_
        assert encode(decode_request(padded)) == encoded


@given(responses, st.lists(st.integers(0, 2000), max_size=8), st.integers(0, 20))
@settings(max_examples=250, deadline=None)
def test_responses_round_trip_however_they_arrive(response: list[Event], splits: list[int], padding: int) -> None:
    encoded = written(*response)
    edges = [0, *sorted(split % (len(encoded) + 1) for split in splits), len(encoded)]
    whole = [event for event in joined(response) if event != Data(b"")]
    assert read(*(encoded[start:end] for start, end in itertools.pairwise(edges)), bytes(padding)) == whole


@given(responses, st.data())
@settings(max_examples=250, deadline=None)
def test_a_response_cut_anywhere_but_between_sections_is_truncated(response: list[Event], data: st.DataObject) -> None:
    """Between sections RFC 9292 lets a message end; that nothing was cut off there is for the seal around it to prove."""
    encoded = written(*response)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    try:
        events = read(encoded[:cut])
    except errors.TruncatedStream:
        return
    whole = [event for event in joined(response) if event != Data(b"")]
    assert events[-1] == End()
    *before, last = events[:-1]
    assert before == whole[: len(before)]
    full = whole[len(before)]
    assert last == full or (isinstance(full, ResponseHead) and last == ResponseHead(full.status, ()))


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_no_bytes_raise_anything_but_a_protocol_error(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from([KNOWN_REQUEST, INDETERMINATE_REQUEST, INDETERMINATE_RESPONSE, KNOWN_RESPONSE]))
    start = data.draw(st.integers(0, len(good)))
    message = good[:start] + data.draw(st.binary(max_size=40)) + good[data.draw(st.integers(start, len(good))) :]
    outcomes = []
    for pieces in ([message], [bytes([byte]) for byte in message]):
        try:
            outcomes.append(read(*pieces))
        except BROKEN as error:
            outcomes.append([type(error)])
    assert outcomes[0] == outcomes[1]
    with contextlib.suppress(BROKEN):
        decode_request(message)


# One use, in order


def test_an_encoder_keeps_the_order_and_ends_once() -> None:
    encoder = ResponseEncoder()
    for early in (lambda: encoder.data(b"x"), encoder.end):
        with pytest.raises(errors.UsageError):
            early()
    encoder.head(200)
    for late in (lambda: encoder.head(200), lambda: encoder.informational(103)):
        with pytest.raises(errors.UsageError):
            late()
    encoder.end()
    for again in (encoder.end, lambda: encoder.data(b"x"), lambda: encoder.head(200)):
        with pytest.raises(errors.AlreadyUsedError):
            again()


def test_a_decoder_serves_once_and_not_after_an_error() -> None:
    decoder = ResponseDecoder()
    decoder.feed(written(ResponseHead(200, ()), End()))
    decoder.close()
    broken = ResponseDecoder()
    with pytest.raises(errors.InvalidMessage):
        broken.feed(b"\x05")
    for one in (decoder, broken):
        for again in (one.close, lambda one=one: one.feed(b"")):
            with pytest.raises(errors.AlreadyUsedError):
                again()


def test_content_is_in_no_repr() -> None:
    secret = Request("POST", "https", "a", "/", (("x", "a prompt"),), b"a prompt", (("x", "a prompt"),))
    for thing in (secret, ResponseHead(200, (("x", "a prompt"),)), Data(b"a prompt"), End((("x", "a prompt"),))):
        assert "a prompt" not in repr(thing)
