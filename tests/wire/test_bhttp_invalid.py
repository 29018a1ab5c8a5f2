"""Binary HTTP that must be refused, by the side that writes it and by the side that reads it alike."""

import pytest

from lacre import errors
from lacre.wire import varint
from lacre.wire.bhttp import (
    MAX_CONTENT,
    MAX_INFORMATIONAL,
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
from lacre.wire.fields import MAX_FIELDS, MAX_HEADER_SECTION, MAX_NAME, MAX_PATH, MAX_VALUE

GET = Request("GET", "https", "example.com", "/")
CONTROL = bytes.fromhex("03474554056874747073 0b6578616d706c652e636f6d 012f")
EMPTY_RESPONSE = bytes.fromhex("0340c8 00 00 00")
RESPONSE_WITH_CONTENT = bytes.fromhex("0140c8 00 0161 00")


def read(*pieces: bytes) -> list[Event]:
    decoder = ResponseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)] + decoder.close()


def line(name: bytes, value: bytes) -> bytes:
    return varint.encode(len(name)) + name + varint.encode(len(value)) + value


def known(headers: bytes = b"", content: bytes = b"", trailers: bytes = b"", *, start: bytes = b"\x00" + CONTROL) -> bytes:
    return start + b"".join(varint.encode(len(part)) + part for part in (headers, content, trailers))


# What is invalid


@pytest.mark.parametrize("framing", ["04", "3f", "4004", "ffffffffffffffff"])
def test_an_unknown_framing_is_invalid(framing: str) -> None:
    with pytest.raises(errors.InvalidMessage):
        decode_request(bytes.fromhex(framing) + CONTROL)
    with pytest.raises(errors.InvalidMessage):
        ResponseDecoder().feed(bytes.fromhex(framing))


def test_a_request_is_not_a_response() -> None:
    with pytest.raises(errors.InvalidMessage):
        decode_request(RESPONSE_WITH_CONTENT)
    with pytest.raises(errors.InvalidMessage):
        read(b"\x00" + CONTROL)


def test_an_empty_message_is_truncated() -> None:
    with pytest.raises(errors.TruncatedStream):
        decode_request(b"")
    with pytest.raises(errors.TruncatedStream):
        ResponseDecoder().close()


BAD_CONTROL = [
    Request("", "https", "a", "/"),
    Request("GE T", "https", "a", "/"),
    Request("GET\r\n", "https", "a", "/"),
    Request("CONNECT", "https", "a", "/"),
    Request("GET", "", "a", "/"),
    Request("GET", "ftp", "a", "/"),
    Request("GET", "HTTPS", "a", "/"),
    Request("GET", "https", "a b", "/"),
    Request("GET", "https", "user@a", "/"),
    Request("GET", "https", "a/b", "/"),
    Request("GET", "https", "a\x00", "/"),
    Request("GET", "https", "a", ""),
    Request("GET", "https", "a", "no-slash"),
    Request("GET", "https", "a", "/a b"),
    Request("GET", "https", "a", "/a#b"),
    Request("GET", "https", "a", "/a\r\nhost: b"),
    Request("GET", "https", "a", "/a\x7f"),
    Request("GET", "https", "a", "*/"),
]


@pytest.mark.parametrize("bad", BAD_CONTROL, ids=repr)
def test_bad_control_data_is_refused_by_both_sides(bad: Request) -> None:
    with pytest.raises(errors.UsageError):
        encode_request(bad)
    parts = (part.encode("latin-1") for part in (bad.method, bad.scheme, bad.authority, bad.path))
    with pytest.raises(errors.InvalidMessage):
        decode_request(known(start=b"\x00" + b"".join(varint.encode(len(part)) + part for part in parts)))


BAD_FIELDS = [
    (b"", b"empty name"),
    (b"a b", b"space"),
    (b"a:", b"colon"),
    (b":path", b"/pseudo"),
    (b":status", b"200"),
    (b"caf\xe9", b"not ascii"),
    (b"a\x00", b"nul"),
    (b"a\n", b"line feed"),
    (b"a", b"nul\x00"),
    (b"a", b"line\nfeed"),
    (b"a", b"carriage\rreturn"),
    (b"a", b"bell\x07"),
    (b"a", b"del\x7f"),
    (b"a", b" leading"),
    (b"a", b"trailing "),
    (b"a", b"\ttab"),
    (b"a", b"newline\n"),
    (b"connection", b"close"),
    (b"keep-alive", b"1"),
    (b"proxy-connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"websocket"),
    (b"te", b"gzip"),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_fields_are_refused_by_both_sides(name: bytes, value: bytes) -> None:
    pair = (name.decode("latin-1"), value.decode("latin-1"))
    for bad in (Request("GET", "https", "a", "/", (pair,)), Request("GET", "https", "a", "/", (), b"", (pair,))):
        for encode in (encode_request, encode_request_indeterminate):
            with pytest.raises(errors.UsageError):
                encode(bad)
    for message in (known(line(name, value)), known(b"", b"", line(name, value))):
        with pytest.raises(errors.InvalidMessage):
            decode_request(message)
    if name:  # an empty name is the end of an indeterminate section
        with pytest.raises(errors.InvalidMessage):
            decode_request(b"\x02" + CONTROL + line(name, value))


def test_names_in_capitals_are_written_small_and_not_read() -> None:
    assert decode_request(encode_request(Request("GET", "https", "a", "/", (("Accept", "X"),)))).headers == (("accept", "X"),)
    with pytest.raises(errors.InvalidMessage):
        decode_request(known(line(b"Accept", b"X")))


def test_fields_that_may_look_odd_are_kept() -> None:
    odd = (("te", "trailers"), ("x", ""), ("x", "a\tb  c"), ("x", "caf\xe9\xff"), ("!#$%&'*+-.^_`|~0", "token"))
    assert decode_request(encode_request(Request("GET", "https", "a", "/", odd))).headers == odd


@pytest.mark.parametrize("name", ["caf\u00e9", "x"])
def test_text_that_is_not_latin_1_is_the_callers_error(name: str) -> None:
    with pytest.raises(errors.UsageError):
        encode_request(Request("GET", "https", "a", "/", ((name, "\u20ac"),)))
    with pytest.raises(errors.UsageError):
        encode_request(Request("GET", "https", "a", "/\u20ac"))


@pytest.mark.parametrize("section", ["01", "0161", "016105", "01610562", "026101"])
def test_a_field_line_past_its_section_is_invalid(section: str) -> None:
    with pytest.raises(errors.InvalidMessage):
        decode_request(known(bytes.fromhex(section)))


@pytest.mark.parametrize("value", ["4", "6", "x", "-5", "5, 5", "", "٥", "5" * 16])
def test_a_content_length_that_lies_is_invalid(value: str) -> None:
    message = known(line(b"content-length", value.encode()), b"12345")
    if value.isascii():
        with pytest.raises(errors.UsageError):
            encode_request(Request("POST", "https", "a", "/", (("Content-Length", value),), b"12345"))
    with pytest.raises(errors.InvalidMessage):
        decode_request(message)
    with pytest.raises(errors.InvalidMessage):
        read(message.replace(b"\x00" + CONTROL, bytes.fromhex("0140c8")))


def test_a_content_length_that_is_true_passes() -> None:
    request = Request("POST", "https", "a", "/", (("content-length", "5"), ("content-length", "5")), b"12345")
    assert decode_request(encode_request(request)) == request
    two = known(line(b"content-length", b"5") + line(b"content-length", b"6"), b"12345")
    with pytest.raises(errors.InvalidMessage):
        decode_request(two)


def test_a_response_to_head_may_announce_what_it_does_not_carry() -> None:
    head = ResponseHead(200, (("content-length", "5"),))
    assert read(bytes.fromhex("0340c8") + line(b"content-length", b"5") + bytes(3)) == [head, End()]


@pytest.mark.parametrize("status", [0, 99, 101, 600, 2**40])
def test_an_impossible_status_is_refused_by_both_sides(status: int) -> None:
    with pytest.raises(errors.InvalidMessage):
        ResponseDecoder().feed(b"\x03" + varint.encode(status))
    with pytest.raises(errors.UsageError):
        ResponseEncoder().head(status)
    with pytest.raises(errors.UsageError):
        ResponseEncoder().informational(status)


def test_a_final_status_is_not_informational() -> None:
    with pytest.raises(errors.UsageError):
        ResponseEncoder().informational(200)
    with pytest.raises(errors.UsageError):
        ResponseEncoder().head(103)


@pytest.mark.parametrize("position", [0, 5, 9])
def test_padding_is_zeros(position: int) -> None:
    padding = bytearray(10)
    padding[position] = 1
    with pytest.raises(errors.InvalidMessage):
        decode_request(known() + padding)
    with pytest.raises(errors.InvalidMessage):
        read(EMPTY_RESPONSE, bytes(padding))


def test_padding_is_never_less_than_the_message() -> None:
    with pytest.raises(errors.UsageError):
        encode_request(GET, padded_to=len(encode_request(GET)) - 1)


# Limits


def test_lengths_above_their_limit_are_refused_at_once() -> None:
    """Each prefix alone: nothing of what it announces ever arrives."""
    huge = varint.encode(varint.MAX)
    control = b"\x00" + CONTROL
    for start in (b"\x00", b"\x00\x03GET", control, control + b"\x00", control + b"\x00\x00", b"\x02" + CONTROL):
        with pytest.raises(errors.MessageTooLarge):
            decode_request(start + huge)
    for start in ("0140c8", "0140c800", "0140c80000", "0340c8", "0340c80161", "0340c800", "0340c8000161", "0340c80000"):
        decoder = ResponseDecoder()
        decoder.feed(bytes.fromhex(start))
        with pytest.raises(errors.MessageTooLarge):
            decoder.feed(huge)


def test_content_above_the_limit_is_refused_over_all_chunks() -> None:
    decoder = ResponseDecoder()
    decoder.feed(bytes.fromhex("0340c800") + b"\x01x")
    with pytest.raises(errors.MessageTooLarge):
        decoder.feed(varint.encode(MAX_CONTENT))


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
        for encode in (encode_request, encode_request_indeterminate):
            assert decode_request(encode(fine)) == fine
    for wrong in (
        request(("x" * (MAX_NAME + 1), "")),
        request(("x", "v" * (MAX_VALUE + 1))),
        request(*[("a", "b")] * (MAX_FIELDS + 1)),
        request(*[("a", "v" * MAX_VALUE)] * 4),
        request(path="/" + "p" * MAX_PATH),
    ):
        with pytest.raises(errors.UsageError):
            encode_request(wrong)
        section = b"".join(line(name.encode(), value.encode()) for name, value in wrong.headers)
        start = CONTROL[:-2] + varint.encode(len(wrong.path)) + wrong.path.encode()
        for message in (known(section, start=b"\x00" + start), b"\x02" + start + section + b"\x00"):
            with pytest.raises(errors.MessageTooLarge):
                decode_request(message)
    assert 4 * MAX_VALUE >= MAX_HEADER_SECTION - 100


def test_too_many_informational_responses_are_refused_by_both_sides() -> None:
    encoder, decoder = ResponseEncoder(), ResponseDecoder()
    for _ in range(MAX_INFORMATIONAL):
        decoder.feed(encoder.informational(103))
    with pytest.raises(errors.UsageError):
        encoder.informational(103)
    with pytest.raises(errors.MessageTooLarge):
        decoder.feed(bytes.fromhex("406700"))
