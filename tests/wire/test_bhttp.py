"""Binary HTTP: the examples of RFC 9292, what both sides refuse, and the limits."""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.wire import bhttp, varint
from lacre.wire.bhttp import Data, End, Event, Request, ResponseDecoder, ResponseEncoder, ResponseHead
from lacre.wire.fields import MAX_FIELDS, MAX_HEADER_SECTION, MAX_NAME, MAX_PATH, MAX_VALUE
from parts.bent import cut

GET = Request("GET", "https", "example.com", "/")
CONTROL = bytes.fromhex("03474554056874747073 0b6578616d706c652e636f6d 012f")
EMPTY_RESPONSE, RESPONSE_WITH_CONTENT = bytes.fromhex("0340c8 00 00 00"), bytes.fromhex("0140c8 00 0161 00")


def refused(error: type[Exception], *calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(error):
            call()


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

RFC_FIELDS = {"user-agent": "curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3", "host": "www.example.com"}
RFC_REQUEST = Request("GET", "https", "", "/hello.txt", (*RFC_FIELDS.items(), ("accept-language", "en, mi")))
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
    assert bhttp.decode_request(KNOWN_REQUEST) == RFC_REQUEST
    assert bhttp.encode_request(RFC_REQUEST) == KNOWN_REQUEST
    for shorter in (KNOWN_REQUEST[:-1], KNOWN_REQUEST[:-2]):
        assert bhttp.decode_request(shorter) == RFC_REQUEST


def test_rfc_indeterminate_length_request() -> None:
    """With ten bytes of padding; "anything up to 12 bytes can be removed from this message"."""
    assert bhttp.encode_request_indeterminate(RFC_REQUEST, padded_to=len(INDETERMINATE_REQUEST)) == INDETERMINATE_REQUEST
    for removed in range(13):
        assert bhttp.decode_request(INDETERMINATE_REQUEST[: len(INDETERMINATE_REQUEST) - removed]) == RFC_REQUEST
    refused(errors.TruncatedStream, partial(bhttp.decode_request, INDETERMINATE_REQUEST[:-13]))


def test_rfc_response_with_interim_responses() -> None:
    events = read(INDETERMINATE_RESPONSE)
    links = (("link", "</style.css>; rel=preload; as=style"), ("link", "</script.js>; rel=preload; as=script"))
    assert events[:2] == [
        ResponseHead(102, (("running", '"sleep 15"'),), informational=True),
        ResponseHead(103, links, informational=True),
    ]
    head = events[2]
    assert isinstance(head, ResponseHead) and head.status == 200 and not head.informational
    assert dict(head.headers)["last-modified"] == "Wed, 22 Jul 2009 19:15:56 GMT" and len(head.headers) == 8
    assert events[3:] == [Data(b"Hello World! My content includes a trailing CRLF.\r\n"), End()]
    assert written(*events) == INDETERMINATE_RESPONSE


def test_rfc_known_length_response_with_trailers_and_messages_byte_by_byte() -> None:
    events = [ResponseHead(200, ()), Data(b"This content contains CRLF.\r\n"), End((("trailer", "text"),))]
    assert read(KNOWN_RESPONSE) == events
    for message in (INDETERMINATE_RESPONSE, KNOWN_RESPONSE, bytes.fromhex("0140c8")):
        assert read(*(bytes([byte]) for byte in message)) == read(message)


def test_the_shortest_messages() -> None:
    """Section 3.8: empty sections at the end may be left out."""
    for control in (b"\x00", b"\x02"):
        assert bhttp.decode_request(control + CONTROL) == GET
    for framing in (b"\x01", b"\x03"):
        for rest in ("40c8", "40c800", "40c8000000"):
            assert read(framing + bytes.fromhex(rest)) == [ResponseHead(200, ()), End()]


def test_events_come_as_soon_as_they_are_complete() -> None:
    encoder, decoder = ResponseEncoder(), ResponseDecoder()
    assert decoder.feed(encoder.informational(103)) == [ResponseHead(103, (), informational=True)]
    head = ResponseHead(200, (("content-type", "text/event-stream"),))
    assert decoder.feed(encoder.head(200, [("Content-Type", "text/event-stream")])) == [head]
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
TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789-_!#$%&'*+.^`|~"
LATIN = [chr(code) for code in (*range(0x20, 0x7F), *range(0x80, 0x100))]
tokens = st.text(TOKEN, min_size=1, max_size=20).filter(lambda name: name not in RULED)
values = st.text(LATIN, max_size=30).map(lambda text: text.strip(" "))
fields = st.lists(st.tuples(tokens, values), max_size=5).map(tuple)
requests = st.builds(
    Request, st.sampled_from(["GET", "POST", "DELETE", "M-SEARCH"]), st.sampled_from(["https", "http"]),
    st.sampled_from(["", "lacre.invalid", "[::1]:8080", "a.example:443"]),
    st.text("abc/?&=%20~;", max_size=20).map("/".__add__) | st.just("*"), fields, st.binary(max_size=200), fields,
)  # fmt: skip
heads = st.builds(ResponseHead, st.integers(200, 599), fields)
informational = st.builds(ResponseHead, st.sampled_from([100, 102, 103, 199]), fields, st.just(True))
pieces = st.builds(Data, st.binary(max_size=60))
responses = st.tuples(st.lists(informational, max_size=3), heads, st.lists(pieces, max_size=5), st.builds(End, fields)).map(
    lambda parts: [*parts[0], parts[1], *parts[2], parts[3]]
)


@given(requests, st.integers(0, 300))
@settings(max_examples=250, deadline=None)
def test_requests_round_trip_in_both_forms(request_: Request, padding: int) -> None:
    for encode in (bhttp.encode_request, bhttp.encode_request_indeterminate):
        encoded = encode(request_)
        assert bhttp.decode_request(encoded) == request_
        padded = encode(request_, padded_to=len(encoded) + padding)
        assert padded == encoded + bytes(padding)
        assert bhttp.decode_request(padded) == request_
        assert encode(bhttp.decode_request(padded)) == encoded


@given(responses, st.lists(st.integers(0, 2000), max_size=8), st.integers(0, 20))
@settings(max_examples=250, deadline=None)
def test_responses_round_trip_however_they_arrive(response: list[Event], splits: list[int], padding: int) -> None:
    encoded = written(*response)
    whole = [event for event in joined(response) if event != Data(b"")]
    assert read(*cut(encoded, splits), bytes(padding)) == whole


@given(responses, st.data())
@settings(max_examples=250, deadline=None)
def test_a_response_cut_anywhere_but_between_sections_is_truncated(response: list[Event], data: st.DataObject) -> None:
    """Between sections RFC 9292 lets a message end; that nothing was cut off there is for the seal around it to prove."""
    encoded = written(*response)
    try:
        events = read(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
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
        except errors.ProtocolError as error:
            outcomes.append([type(error)])
    assert outcomes[0] == outcomes[1]
    with contextlib.suppress(errors.ProtocolError):
        bhttp.decode_request(message)


# One use, in order


def test_an_encoder_keeps_the_order_and_ends_once() -> None:
    encoder = ResponseEncoder()
    refused(errors.UsageError, partial(encoder.data, b"x"), encoder.end)
    encoder.head(200)
    refused(errors.UsageError, partial(encoder.head, 200), partial(encoder.informational, 103))
    encoder.end()
    refused(errors.AlreadyUsedError, encoder.end, partial(encoder.data, b"x"), partial(encoder.head, 200))


def test_a_decoder_serves_once_and_not_after_an_error() -> None:
    decoder, broken = ResponseDecoder(), ResponseDecoder()
    decoder.feed(written(ResponseHead(200, ()), End()))
    decoder.close()
    refused(errors.InvalidMessage, partial(broken.feed, b"\x05"))
    for one in (decoder, broken):
        refused(errors.AlreadyUsedError, one.close, partial(one.feed, b""))


def test_content_is_in_no_repr() -> None:
    secret = Request("POST", "https", "a", "/", (("x", "a prompt"),), b"a prompt", (("x", "a prompt"),))
    for thing in (secret, ResponseHead(200, (("x", "a prompt"),)), Data(b"a prompt"), End((("x", "a prompt"),))):
        assert "a prompt" not in repr(thing)


# What is invalid, for the side that writes it and for the side that reads it alike


def line(name: bytes, value: bytes) -> bytes:
    return varint.encode(len(name)) + name + varint.encode(len(value)) + value


def known(headers: bytes = b"", content: bytes = b"", trailers: bytes = b"", *, start: bytes = b"\x00" + CONTROL) -> bytes:
    return start + b"".join(varint.encode(len(part)) + part for part in (headers, content, trailers))


def test_a_framing_that_is_unknown_or_of_the_other_kind_is_invalid() -> None:
    for start in (b"\x04", b"\x3f", b"\x40\x04", b"\xff" * 8):
        refused(errors.InvalidMessage, partial(bhttp.decode_request, start + CONTROL), partial(ResponseDecoder().feed, start))
    refused(errors.InvalidMessage, partial(bhttp.decode_request, RESPONSE_WITH_CONTENT), partial(read, b"\x00" + CONTROL))
    refused(errors.TruncatedStream, partial(bhttp.decode_request, b""), ResponseDecoder().close)


BAD_CONTROL = [
    *(Request(method, "https", "a", "/") for method in ("", "GE T", "GET\r\n", "CONNECT")),
    *(Request("GET", scheme, "a", "/") for scheme in ("", "ftp", "HTTPS")),
    *(Request("GET", "https", authority, "/") for authority in ("a b", "user@a", "a/b", "a\x00")),
    *(Request("GET", "https", "a", path) for path in ("", "no-slash", "/a b", "/a#b", "/a\r\nhost: b", "/a\x7f", "*/")),
]


@pytest.mark.parametrize("bad", BAD_CONTROL, ids=repr)
def test_bad_control_data_is_refused_by_both_sides(bad: Request) -> None:
    parts = (part.encode("latin-1") for part in (bad.method, bad.scheme, bad.authority, bad.path))
    start = b"\x00" + b"".join(varint.encode(len(part)) + part for part in parts)
    refused(errors.UsageError, partial(bhttp.encode_request, bad))
    refused(errors.InvalidMessage, partial(bhttp.decode_request, known(start=start)))


BAD_NAMES = (b"", b"a b", b"a:", b":path", b":status", b"caf\xe9", b"a\x00", b"a\n")
BAD_VALUES = (
    b"nul\x00", b"line\nfeed", b"carriage\rreturn", b"bell\x07", b"del\x7f", b" leading", b"trailing ", b"\ttab", b"newline\n"
)  # fmt: skip
BAD_FIELDS = [
    *((name, b"x") for name in BAD_NAMES), *((b"a", value) for value in BAD_VALUES), (b"connection", b"close"),
    (b"keep-alive", b"1"), (b"proxy-connection", b"close"), (b"transfer-encoding", b"chunked"), (b"upgrade", b"websocket"),
    (b"te", b"gzip"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_fields_are_refused_by_both_sides(name: bytes, value: bytes) -> None:
    pair = (name.decode("latin-1"), value.decode("latin-1"))
    for bad in (Request("GET", "https", "a", "/", (pair,)), Request("GET", "https", "a", "/", (), b"", (pair,))):
        for encode in (bhttp.encode_request, bhttp.encode_request_indeterminate):
            refused(errors.UsageError, partial(encode, bad))
    messages = [known(line(name, value)), known(b"", b"", line(name, value))]
    if name:  # an empty name is the end of an indeterminate section
        messages.append(b"\x02" + CONTROL + line(name, value))
    for message in messages:
        refused(errors.InvalidMessage, partial(bhttp.decode_request, message))


def test_names_in_capitals_are_written_small_and_not_read() -> None:
    assert bhttp.decode_request(bhttp.encode_request(Request("GET", "https", "a", "/", (("Accept", "X"),)))).headers == (
        ("accept", "X"),
    )
    refused(errors.InvalidMessage, partial(bhttp.decode_request, known(line(b"Accept", b"X"))))


def test_fields_that_may_look_odd_are_kept() -> None:
    odd = (("te", "trailers"), ("x", ""), ("x", "a\tb  c"), ("x", "caf\xe9\xff"), ("!#$%&'*+-.^_`|~0", "token"))
    assert bhttp.decode_request(bhttp.encode_request(Request("GET", "https", "a", "/", odd))).headers == odd


def test_text_that_is_not_latin_1_is_the_callers_error() -> None:
    for path, headers in (("/€", ()), ("/", (("café", "€"),)), ("/", (("x", "€"),))):
        refused(errors.UsageError, partial(bhttp.encode_request, Request("GET", "https", "a", path, headers)))


@pytest.mark.parametrize("section", ["01", "0161", "016105", "01610562", "026101"])
def test_a_field_line_past_its_section_is_invalid(section: str) -> None:
    refused(errors.InvalidMessage, partial(bhttp.decode_request, known(bytes.fromhex(section))))


@pytest.mark.parametrize("value", ["4", "6", "x", "-5", "5, 5", "", "٥", "5" * 16])
def test_a_content_length_that_lies_is_invalid(value: str) -> None:
    message = known(line(b"content-length", value.encode()), b"12345")
    if value.isascii():
        said = Request("POST", "https", "a", "/", (("Content-Length", value),), b"12345")
        refused(errors.UsageError, partial(bhttp.encode_request, said))
    response = message.replace(b"\x00" + CONTROL, bytes.fromhex("0140c8"))
    refused(errors.InvalidMessage, partial(bhttp.decode_request, message), partial(read, response))


def test_a_content_length_that_is_true_passes() -> None:
    """And a response to HEAD may announce what it does not carry."""
    request = Request("POST", "https", "a", "/", (("content-length", "5"), ("content-length", "5")), b"12345")
    assert bhttp.decode_request(bhttp.encode_request(request)) == request
    two = known(line(b"content-length", b"5") + line(b"content-length", b"6"), b"12345")
    refused(errors.InvalidMessage, partial(bhttp.decode_request, two))
    head = ResponseHead(200, (("content-length", "5"),))
    assert read(bytes.fromhex("0340c8") + line(b"content-length", b"5") + bytes(3)) == [head, End()]


def test_an_impossible_status_is_refused_by_both_sides_and_a_final_one_is_not_informational() -> None:
    encoder = ResponseEncoder()
    for status in (0, 99, 101, 600, 2**40):
        refused(errors.InvalidMessage, partial(ResponseDecoder().feed, b"\x03" + varint.encode(status)))
        refused(errors.UsageError, partial(encoder.head, status), partial(encoder.informational, status))
    refused(errors.UsageError, partial(encoder.informational, 200), partial(encoder.head, 103))


@pytest.mark.parametrize("position", [0, 5, 9])
def test_padding_is_zeros_and_never_less_than_the_message(position: int) -> None:
    padding = bytes(position) + b"\x01" + bytes(9 - position)
    refused(errors.InvalidMessage, partial(bhttp.decode_request, known() + padding), partial(read, EMPTY_RESPONSE, padding))
    refused(errors.UsageError, partial(bhttp.encode_request, GET, padded_to=len(bhttp.encode_request(GET)) - 1))


# Limits


def test_lengths_above_their_limit_are_refused_at_once() -> None:
    """Each prefix alone: nothing of what it announces ever arrives."""
    huge = varint.encode(varint.MAX)
    control = b"\x00" + CONTROL
    for start in (b"\x00", b"\x00\x03GET", control, control + b"\x00", control + b"\x00\x00", b"\x02" + CONTROL):
        refused(errors.MessageTooLarge, partial(bhttp.decode_request, start + huge))
    for start in ("0140c8", "0140c800", "0140c80000", "0340c8", "0340c80161", "0340c800", "0340c8000161", "0340c80000"):
        decoder = ResponseDecoder()
        decoder.feed(bytes.fromhex(start))
        refused(errors.MessageTooLarge, partial(decoder.feed, huge))


def test_content_above_the_limit_is_refused_over_all_chunks() -> None:
    decoder = ResponseDecoder()
    decoder.feed(bytes.fromhex("0340c800") + b"\x01x")
    refused(errors.MessageTooLarge, partial(decoder.feed, varint.encode(bhttp.MAX_CONTENT)))


def test_fields_up_to_their_limits_pass_and_not_further() -> None:
    def request(*headers: tuple[str, str], path: str = "/") -> Request:
        return Request("GET", "https", "a", path, headers)

    largest = [("x" * MAX_NAME, "v" * MAX_VALUE)]
    for fine in (
        request(*largest),
        request(*[("a", "b")] * MAX_FIELDS),
        request(*[("a", "v" * MAX_VALUE)] * 3),
        request(path="/" + "p" * (MAX_PATH - 1)),
    ):
        for encode in (bhttp.encode_request, bhttp.encode_request_indeterminate):
            assert bhttp.decode_request(encode(fine)) == fine
    for wrong in (
        request(("x" * (MAX_NAME + 1), "")),
        request(("x", "v" * (MAX_VALUE + 1))),
        request(*[("a", "b")] * (MAX_FIELDS + 1)),
        request(*[("a", "v" * MAX_VALUE)] * 4),
        request(path="/" + "p" * MAX_PATH),
    ):
        refused(errors.UsageError, partial(bhttp.encode_request, wrong))
        section = b"".join(line(name.encode(), value.encode()) for name, value in wrong.headers)
        start = CONTROL[:-2] + varint.encode(len(wrong.path)) + wrong.path.encode()
        for message in (known(section, start=b"\x00" + start), b"\x02" + start + section + b"\x00"):
            refused(errors.MessageTooLarge, partial(bhttp.decode_request, message))
    assert 4 * MAX_VALUE >= MAX_HEADER_SECTION - 100


def test_too_many_informational_responses_are_refused_by_both_sides() -> None:
    encoder, decoder = ResponseEncoder(), ResponseDecoder()
    for _ in range(bhttp.MAX_INFORMATIONAL):
        decoder.feed(encoder.informational(103))
    refused(errors.UsageError, partial(encoder.informational, 103))
    refused(errors.MessageTooLarge, partial(decoder.feed, bytes.fromhex("406700")))
