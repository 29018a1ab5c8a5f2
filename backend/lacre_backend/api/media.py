"""Images and audio in a request: decoded, recognized by their first bytes, and bounded, before anything else sees them.

Rules:
- Media come inside the request, in base64. An address is refused, by every model: a worker dials nobody, and the owner of the
  address would learn of the request.
- Nothing is decompressed here. A picture's size is read from its head, so no small file can claim the memory of a huge picture.
- The first bytes decide what a file is. A media type that says otherwise is refused.
- Lengths are checked before anything is decoded. Errors name the field and never repeat its value.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.parsed import Echoed, validated
from lacre_backend.engine.pictures import MAX_SCANS, has_many_scans

MAX_MEDIA: Final = 16  # in one request: each costs a model hundreds of tokens
MAX_BYTES: Final = 5 * 2**20  # of one, decoded: a sealed request of 7 MiB has room for no more in base64
MAX_PIXELS: Final = 2**24  # of a picture: a decoder takes four bytes for each, so 64 MiB
MAX_SIDE: Final = 2**14  # pixels: decoders multiply both sides
_MAX_MARKS: Final = 2**14  # of a JPEG, fillers too, before its size: photos have some tens, and all requests wait meanwhile
_MAX_URL_HEAD: Final = 256  # characters of a data URL before its data
_DATA: Final = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9.+-]+=[a-z0-9.+-]+)*;base64,", re.IGNORECASE)
# Types that say the same as another
_SAME: Final[Mapping[str, str]] = {"image/jpg": "image/jpeg", "audio/mpeg": "audio/mp3", "audio/x-wav": "audio/wav"}

MediaKind = Literal["image", "audio"]
_MANY: Final[Mapping[MediaKind, str]] = {"image": "images", "audio": "audio"}
FILES: Final = ("file", "input_file", "document", "container_upload")  # types of parts that hold a document
PARTS: Final = ("image_url", "input_image", "image", "input_audio", "audio", "audio_url")  # that hold an image or audio
VIDEOS: Final = ("video", "video_url", "input_video")


@dataclass(frozen=True, slots=True)
class Media:
    """An image or audio of a request. type: such as `image/png`. at: its part in the caller's words, for errors."""

    kind: MediaKind
    type: str
    data: bytes = field(repr=False)
    at: str


def not_taken(model: str, media: Media) -> RequestRefused:
    """The model reads no such thing."""
    return RequestRefused(
        f"The model `{model}` takes no {_MANY[media.kind]}. Send text, or name a model that takes them.",
        code="unsupported_value",
        param=f"{media.at}.type",
    )


def misplaced(at: str) -> RequestRefused:
    return RequestRefused("Images and audio stand in the user's messages alone.", code="unsupported_value", param=f"{at}.type")


def not_read(kind: object, at: str) -> RequestRefused:
    """A part of another type than text, images and audio."""
    said = "Files are not read: send their text." if kind in FILES else "Only text, images and audio are read."
    return RequestRefused(said, code="unsupported_value", param=f"{at}.type")


# The parts of each API


class _Part(Echoed):
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations", "id", "prompt_cache_breakpoint"})


class _Address(_Part):
    """detail: how closely to look. It is a wish: a model without such a choice ignores it."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class _ChatImage(_Part):
    type: Literal["image_url"]
    image_url: _Address


class _Sound(_Part):
    data: str
    format: Literal["wav", "mp3"]


class _ChatAudio(_Part):
    type: Literal["input_audio"]
    input_audio: _Sound


class _InputImage(_Part):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Source(_Part):
    type: Literal["base64"]
    media_type: str
    data: str


class _Block(_Part):
    type: Literal["image"]
    source: _Source


def of_chat(part: Mapping[str, Any], at: str) -> Media:
    """A part of a chat's message, of a type in `PARTS`. Raises `RequestRefused`."""
    match part.get("type"):
        case "image_url":
            given = part.get("image_url")
            if isinstance(given, str):  # as some clients write it
                return _image_at(given, f"{at}.image_url", at)
            address = validated(_ChatImage, part, at=at).image_url
            return _image_at(address.url, f"{at}.image_url.url", at)
        case "input_audio":
            sound = validated(_ChatAudio, part, at=at).input_audio
            return _media("audio", f"audio/{sound.format}", sound.data, f"{at}.input_audio.data", at)
        case kind:
            raise not_read(kind, at)


def of_responses(part: Mapping[str, Any], at: str) -> Media:
    """A part of an item of the Responses API, of a type in `PARTS`. Raises `RequestRefused`."""
    if part.get("type") == "input_audio":
        return of_chat(part, at)
    if part.get("type") != "input_image":
        raise not_read(part.get("type"), at)
    read = validated(_InputImage, part, at=at)
    if read.image_url is None:
        raise RequestRefused(
            "Nothing is stored here: send the image as a data: URL.",
            code="unsupported_value",
            param=f"{at}.{'image_url' if read.file_id is None else 'file_id'}",
        )
    return _image_at(read.image_url, f"{at}.image_url", at)


def of_messages(block: Mapping[str, Any], at: str) -> Media:
    """An `image` block of the Messages API. Raises `RequestRefused`."""
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") in ("url", "file"):
        raise _elsewhere(f"{at}.source.type")
    read = validated(_Block, block, at=at).source
    return _media("image", read.media_type, read.data, f"{at}.source.data", at)


# Decoding


def _elsewhere(param: str) -> RequestRefused:
    return RequestRefused(
        "Only data: URLs are read: a worker fetches nothing and stores nothing. Send the file itself, in base64.",
        code="unsupported_value",
        param=param,
    )


def _invalid(kind: MediaKind, what: str, param: str) -> RequestRefused:
    return RequestRefused(f"Invalid '{param}': {what}.", code=f"invalid_{kind}", param=param)


def _split(url: str, param: str) -> tuple[str, str]:
    """The media type and the base64 of a data URL (RFC 2397). Raises `RequestRefused`."""
    if url[:5].lower() != "data:":
        raise _elsewhere(param)
    head = _DATA.match(url[:_MAX_URL_HEAD])
    if head is None:
        raise _invalid("image", "a data: URL has a media type, then `;base64,` and the data", param)
    return head[1], url[head.end() :]


def _image_at(url: str, param: str, at: str) -> Media:
    media_type, data = _split(url, param)
    return _media("image", media_type, data, param, at)


def _media(kind: MediaKind, media_type: str, data: str, param: str, at: str) -> Media:
    """Raises `RequestRefused`."""
    if len(data) // 4 * 3 > MAX_BYTES:
        raise RequestRefused(
            f"Invalid '{param}': more than {MAX_BYTES // 2**20} MiB. Send a smaller one.", code=f"{kind}_too_large", param=param
        )
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(kind, "no base64", param) from None
    found = next((name for name, recognized in _RECOGNIZED[kind].items() if recognized(content)), None)
    if found is None:
        raise _invalid(kind, f"not one of {', '.join(_RECOGNIZED[kind])}", param)
    said = media_type.lower()
    if _SAME.get(said, said) != found:
        raise _invalid(kind, f"its first bytes are those of {found}, not of the type that it is said to have", param)
    if kind == "image":
        _check_size(_SIZES[found](content), param)
        if found == _JPEG and has_many_scans(content):
            raise _invalid("image", f"it has more than {MAX_SCANS} scans", param)
    return Media(kind, found, content, at)


def _check_size(size: tuple[int, int] | None, param: str) -> None:
    if size is None or min(size) < 1:
        raise _invalid("image", "its head is broken, or says no size", param)
    width, height = size
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RequestRefused(
            f"Invalid '{param}': {width} x {height} pixels. At most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} a side.",
            code="image_too_large",
            param=param,
        )


# Formats: the first bytes, and where the head says the size

_PNG, _JPEG, _GIF, _WEBP = "image/png", "image/jpeg", "image/gif", "image/webp"
_RECOGNIZED: Final[Mapping[MediaKind, Mapping[str, Callable[[bytes], bool]]]] = {
    "image": {
        _PNG: lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
        _JPEG: lambda data: data.startswith(b"\xff\xd8\xff"),
        _GIF: lambda data: data.startswith((b"GIF87a", b"GIF89a")),
        _WEBP: lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
    },
    "audio": {
        "audio/wav": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WAVE",
        # An ID3 tag, or a frame of MPEG 1 or 2, layer III (ISO 11172-3)
        "audio/mp3": lambda data: data.startswith(b"ID3") or data[:2] in (b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2"),
    },
}


def _png_size(data: bytes) -> tuple[int, int] | None:
    """The first chunk is IHDR (PNG, section 11.2.1)."""
    return struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" and len(data) >= 24 else None


def _gif_size(data: bytes) -> tuple[int, int] | None:
    return struct.unpack("<HH", data[6:10]) if len(data) >= 10 else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Segments up to the frame's head (ITU T.81, B.2.2): each a mark, and a length that counts itself."""
    at = 2
    for _ in range(_MAX_MARKS):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        mark = data[at + 1]
        if mark == 0xFF:  # a filler
            at += 1
        elif 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif mark == 0x01 or 0xD0 <= mark <= 0xD8:  # without a length
            at += 2
        elif mark in (0xD9, 0xDA):  # the end, or the picture itself, before any frame
            return None
        else:
            at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """RFC 9649, sections 2.5 to 2.7."""
    if len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8 " if data[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L" if data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


_SIZES: Final[Mapping[str, Callable[[bytes], tuple[int, int] | None]]] = {
    _PNG: _png_size,
    _JPEG: _jpeg_size,
    _GIF: _gif_size,
    _WEBP: _webp_size,
}
