"""Images and audio in a request: what is decoded, what is refused and by which name, in the words of each API."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import pytest

from backend.posting import CHAT, post
from lacre.asgi import App
from lacre_backend.api import media
from lacre_backend.api.app import create_app
from lacre_backend.api.errors import RequestRefused
from parts.echo_engine import EchoEngine

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
COUNTS = (f"{RESPONSES}/input_tokens", f"{MESSAGES}/count_tokens")
NAMES: Final = {CHAT: "messages[0].content[0]", RESPONSES: "input[0].content[0]", MESSAGES: "messages[0].content[0]"}


def png(width: int = 2, height: int = 3) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"".join(b"\0" + bytes(3 * width) for _ in range(height))) if width * height < 1000 else b""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(width: int, height: int, *, before: bytes = b"\xff\xe0\x00\x04ab", scans: int = 1) -> bytes:
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    return b"\xff\xd8" + before + frame + b"\xff\xda\x00\x02" * scans + b"\xff\xd9"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0;"


def webp(name: bytes, data: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBP" + name + struct.pack("<I", len(data)) + data.ljust(18, b"\0")


def lossy(width: int, height: int) -> bytes:
    return webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height))


def lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14))


def extended(width: int, height: int) -> bytes:
    return webp(b"VP8X", b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


WAV: Final = (
    b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data\0\0\0\0"
)
MP3: Final = b"\xff\xfb\x90\x00" + bytes(100)


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(path: str, address: str) -> dict[str, Any]:
    """An image, as the API of this path writes it."""
    if path == CHAT:
        return {"type": "image_url", "image_url": {"url": address, "detail": "low"}}
    if path.startswith(RESPONSES):
        return {"type": "input_image", "image_url": address, "detail": "auto"}
    if not address.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": address}}
    kind, _, data = address.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}, "cache_control": {"type": "x"}}


def asked(path: str, *parts: Any, role: str = "user") -> dict[str, Any]:
    said = [{"role": role, "content": list(parts)}]
    return {"model": "echo"} | (
        {"input": said} if path.startswith(RESPONSES) else {"messages": said, **({} if path in COUNTS else {"max_tokens": 9})}
    )


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with closing(EchoEngine(n_ctx=1024)) as engine:
        yield create_app([engine])


async def refused(app: App, path: str, body: Any) -> dict[str, Any]:
    """The error, in the shape of this API."""
    reply = await post(app, path, body)
    assert reply.status in (400, 413), reply.body
    told = reply.json()
    if path.startswith(MESSAGES):
        assert told.keys() >= {"type", "error"} and told["type"] == "error"
        assert told["error"].keys() == {"type", "message"}
        return told["error"]  # type: ignore[no-any-return]
    assert told.keys() == {"error"} and told["error"].keys() == {"message", "type", "param", "code"}
    return told["error"]  # type: ignore[no-any-return]


def names(path: str, error: dict[str, Any], param: str) -> bool:
    return param in error["message"] if path.startswith(MESSAGES) else param == error["param"]


# A whole image, and a model of texts


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, *COUNTS])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_model_of_texts_takes_no_image(app: App, path: str, stream: bool) -> None:
    body = asked(path, part(path, url(png())))
    if stream and path not in COUNTS:
        body["stream"] = True
    error = await refused(app, path, body)
    assert "The model `echo` takes no images" in error["message"]
    assert error["type"] == "invalid_request_error"
    if not path.startswith(MESSAGES):
        assert error["param"] == NAMES[path.removesuffix("/input_tokens")] + ".type"


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(("format", "data"), [("wav", WAV), ("mp3", MP3), ("mp3", b"ID3\x04" + bytes(60))])
async def test_a_model_of_texts_takes_no_audio(app: App, path: str, format: str, data: bytes) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": format}}
    error = await refused(app, path, asked(path, sound))
    assert "The model `echo` takes no audio" in error["message"]


WHOLE: Final = (
    png(7, 5), jpeg(7, 5), jpeg(7, 5, before=b""), jpeg(7, 5, before=b"\xff" * 99), jpeg(7, 5, scans=100), gif(7, 5),
    lossy(7, 5), lossless(7, 5), extended(7, 5),
)  # fmt: skip


@pytest.mark.parametrize("data", WHOLE, ids=range(len(WHOLE)))
def test_every_format_is_read(data: bytes) -> None:
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    kind = next(name for first, name in kinds.items() if data.startswith(first))
    assert media._SIZES[kind](data) == (7, 5)
    found = media.of_chat({"type": "image_url", "image_url": {"url": url(data, kind)}}, "here")
    assert (found.kind, found.type, found.data, found.at) == ("image", kind, data, "here")


def test_both_forms_and_types_of_a_jpeg() -> None:
    for said in ("image/jpeg", "image/jpg", "IMAGE/JPEG", "image/jpeg;charset=x"):
        assert media.of_chat({"type": "image_url", "image_url": url(jpeg(1, 1), said)}, "at").type == "image/jpeg"


# Bounds

LARGE: Final = {
    "many pixels": png(5000, 5000),
    "a long side": png(2**14 + 1, 1),
    "more than any memory": png(2**31, 2**31),
    "a jpeg": jpeg(65535, 65535),
    "a gif": gif(65535, 65535),
    "a webp": extended(2**24, 2**24),
}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE)
async def test_a_small_file_of_a_large_picture(app: App, path: str, data: bytes) -> None:
    kind = "image/png" if data[:1] == b"\x89" else {b"\xff": "image/jpeg", b"G": "image/gif", b"R": "image/webp"}[data[:1]]
    error = await refused(app, path, asked(path, part(path, url(data, kind))))
    assert "pixels. At most 16,777,216" in error["message"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_file_of_too_many_bytes(app: App, path: str) -> None:
    error = await refused(app, path, asked(path, part(path, url(png() + bytes(media.MAX_BYTES)))))
    assert "more than 5 MiB" in error["message"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_too_many_files(app: App, path: str) -> None:
    error = await refused(app, path, asked(path, *[part(path, url(png()))] * (media.MAX_MEDIA + 1)))
    assert f"hold {media.MAX_MEDIA + 1} images" in error["message"]


# What is refused by name

BROKEN: Final = {
    "no base64": ("data:image/png;base64,@@@@", "no base64"),
    "white space in it": (url(png()).replace("=", "\n="), "no base64"),
    "another type": (url(png(), "image/gif"), "those of image/png"),
    "no picture": (url(b"<svg></svg>", "image/svg+xml"), "not one of"),
    "empty": (url(b""), "not one of"),
    "cut off": (url(png()[:20]), "head is broken"),
    "no width": (url(png(0, 5)), "head is broken"),
    "a jpeg without a frame": (url(b"\xff\xd8\xff\xda\0\2\xff\xd9", "image/jpeg"), "head is broken"),
    "a jpeg of fillers": (url(b"\xff\xd8" + b"\xff" * 5000, "image/jpeg"), "head is broken"),
    "a jpeg of fillers before a whole one": (url(jpeg(7, 5, before=b"\xff" * 70_000), "image/jpeg"), "head is broken"),
    "a jpeg of empty segments": (url(jpeg(7, 5, before=b"\xff\xe0\0\2" * 70_000), "image/jpeg"), "head is broken"),
    "a jpeg of many scans": (url(jpeg(7, 5, scans=101), "image/jpeg"), "more than 100 scans"),
}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(("address", "said"), BROKEN.values(), ids=BROKEN)
async def test_what_is_no_image(app: App, path: str, address: str, said: str) -> None:
    error = await refused(app, path, asked(path, part(path, address)))
    assert said in error["message"]
    where = {CHAT: ".image_url.url", RESPONSES: ".image_url", MESSAGES: ".source.data"}[path]
    assert names(path, error, NAMES[path] + where)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    "address", ["https://example.com/a.png", "http://10.0.0.1/", "file:///etc/passwd", "//x/y.png", "a.png", "", "ftp://x"]
)
async def test_nobody_is_dialled(app: App, path: str, address: str) -> None:
    error = await refused(app, path, asked(path, part(path, address)))
    assert "Only data: URLs are read" in error["message"]
    assert address == "" or address not in error["message"]


ELSEWHERE: Final = [
    (CHAT, {"type": "file", "file": {"file_id": "f"}}, "Files are not read"),
    (CHAT, {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "Only text, images and audio"),
    (RESPONSES, {"type": "input_file", "file_url": "https://x/y.pdf"}, "Files are not read"),
    (RESPONSES, {"type": "input_image", "file_id": "file-1"}, "Nothing is stored here"),
    (RESPONSES, {"type": "input_video"}, "Only text, images and audio"),
    (MESSAGES, {"type": "document", "source": {"type": "base64", "data": "", "media_type": "application/pdf"}}, "Files are"),
    (MESSAGES, {"type": "image", "source": {"type": "file", "file_id": "f"}}, "Only data: URLs are read"),
    (MESSAGES, {"type": "container_upload", "file_id": "f"}, "Files are not read"),
]


@pytest.mark.parametrize(("path", "given", "said"), ELSEWHERE)
async def test_what_is_somewhere_else(app: App, path: str, given: Any, said: str) -> None:
    assert said in (await refused(app, path, asked(path, given)))["message"]


@pytest.mark.parametrize(
    ("path", "role"),
    [(path, role) for path in (CHAT, RESPONSES) for role in ("system", "assistant", "developer")]
    + [(MESSAGES, "system"), (MESSAGES, "assistant")],
)
async def test_only_a_user_shows_images(app: App, path: str, role: str) -> None:
    error = await refused(app, path, asked(path, part(path, url(png())), role=role))
    assert "stand in the user's messages alone" in error["message"]


async def test_a_tool_shows_none(app: App) -> None:
    image = part(MESSAGES, url(png()))
    turns = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [image]}]},
    ]
    error = await refused(app, MESSAGES, {"model": "echo", "max_tokens": 5, "messages": turns})
    assert "messages[2].content[0].content[0].type" in error["message"]
    items = [
        {"role": "user", "content": "Look"},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [part(RESPONSES, url(png()))]},
    ]
    assert (await refused(app, RESPONSES, {"model": "echo", "input": items}))["param"] == "input[2].output[0].type"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_nobody_hands_in_a_decoded_one(app: App, path: str) -> None:
    made = {"type": "text", "text": "", "held": {"kind": "image", "type": "image/png", "data": "", "at": ""}}
    assert names(path, await refused(app, path, asked(path, made)), f"{NAMES[path]}.held")


async def test_an_explanation_takes_none(app: App) -> None:
    body = {"model": "echo", "messages": asked(CHAT, {**part(CHAT, url(png())), "id": "a"})["messages"]}
    assert "takes no images" in (await refused(app, "/v1/explain", body))["message"]


@pytest.mark.parametrize("address", [url(png()), "http://10.0.0.1/a.png"], ids=["inside", "elsewhere"])
@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/completions", "prompt"),
        ("/v1/completions", "suffix"),
        ("/infill", "input_prefix"),
        ("/v1/embeddings", "input"),
        ("/v1/rerank", "query"),
        ("/v1/tokenize", "prompt"),
    ],
)
async def test_an_api_of_texts_refuses_a_picture_by_its_member(app: App, path: str, param: str, address: str) -> None:
    texts = {"prompt": "a", "input_suffix": "b", "documents": ["c"], "max_tokens": 3}
    asked = {"/v1/completions": ("prompt", "max_tokens"), "/infill": ("input_suffix",), "/v1/rerank": ("documents",)}
    body = {"model": "echo"} | {name: texts[name] for name in asked.get(path, ())} | {param: [part(CHAT, address)]}
    error = await refused(app, path, body)
    assert (error["code"], str(error["param"]).partition("[")[0]) == ("invalid_type", param)


def test_no_head_breaks_a_parser() -> None:
    """Any bytes behind the right first ones give a size or none."""
    source = random.Random(3)
    whole = [png(), jpeg(9, 9), gif(3, 3), lossy(4, 4), lossless(4, 4), extended(4, 4)]
    for _ in range(4000):
        data = bytearray(source.choice(whole))
        for _ in range(source.randrange(4)):
            data[source.randrange(len(data))] = source.randrange(256)
        cut = bytes(data[: source.randrange(len(data) + 1)])
        for size in media._SIZES.values():
            found = size(cut)
            assert found is None or (len(found) == 2 and min(found) >= 0)
        try:
            media.of_chat({"type": "image_url", "image_url": {"url": url(cut)}}, "at")
        except RequestRefused:
            continue
