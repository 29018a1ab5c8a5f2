"""A malicious caller of a model that reads images: pictures that cost more than they say, and texts that pose as pictures."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import Test, chat
from lacre import ApiError
from lacre.wire.bhttp import encode_request
from lacre_backend.api.app import create_app
from lacre_backend.api.media import MAX_MEDIA
from parts.keys import MODEL
from parts.seeing_engine import SeeingEngine
from parts.stage import Stage


def png(width: int, height: int) -> bytes:
    """Whole by its head and its end. No pixel is in it: only its size counts here."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


def shown(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def scanned(scans: int) -> dict[str, Any]:
    """A progressive JPEG of 28 x 28 pixels: its head, and so many scans."""
    head = b"\xff\xd8\xff\xc2" + struct.pack(">HBHHB", 11, 8, 28, 28, 1) + b"\1\x11\0"
    return shown(head + b"\xff\xda\0\x08\1\1\0\1\x3f\0\0" * scans + b"\xff\xd9", "jpeg")


def heard() -> dict[str, Any]:
    wave = base64.b64encode(b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)).decode()
    return {"type": "input_audio", "input_audio": {"data": wave, "format": "wav"}}


SMALL, LARGE = shown(png(28, 28)), shown(png(1400, 1400))  # of 1 and of 2500 tokens
LOOK: Final = {"type": "text", "text": "What is it?"}


def message(stage: Stage, parts: Sequence[dict[str, Any]]) -> bytes:
    return encode_request(inner(chat(stage, messages=[{"role": "user", "content": list(parts)}])))


def told(name: str, defence: str, code: str, *cases: list[dict[str, Any]], template: str | None = None, most: int = 0,
         **grant: Any) -> Test:  # fmt: skip
    """The attack of a caller that shows these parts: the worker answers with that error.

    most: pictures that it reads before.
    """

    @attack(name, "client", defence, ApiError, code=code, cases=cases, ids=range(len(cases)))
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: list[dict[str, Any]]) -> None:
        with closing(SeeingEngine(name=MODEL, template=template)) as engine:
            await stage.worker(create_app([engine]), models=[MODEL])
            answer = await gateway.submit(message(stage, case), **grant)
            verdict.answered(answer.status, str(answer.code))
            assert engine.reader.read_so_far <= most
            assert (await gateway.submit(message(stage, [LOOK]))).status == 200

    return test


test_audio = told("send audio to a model that reads images", "each kind of media is refused by itself, before any is read",
    "unsupported_value", [heard()], [SMALL, heard()], [heard(), SMALL])  # fmt: skip
test_addresses = told("have the worker of a model that reads images fetch an address",
    "media come inside the request, whatever the model reads", "unsupported_value",
    *([{"type": "image_url", "image_url": {"url": address}}, SMALL]
      for address in ("http://169.254.169.254/latest", "https://example.com/a.png", "file:///etc/passwd")))  # fmt: skip
test_many_tokens = told("send a small file of a picture that becomes more tokens than the reservation covers",
    "a picture's tokens count into the prompt before anything is computed", "grant_mismatch",
    [LARGE, LOOK], [*[SMALL] * 9, LARGE], most=10, max_prompt_tokens=400)  # fmt: skip
test_beyond_the_context = told("have the worker decode pictures for a prompt that cannot fit",
    "pictures are read one by one, and only as long as the prompt can fit", "context_length_exceeded",
    [LARGE] * MAX_MEDIA, most=2, max_prompt_tokens=100_000)  # fmt: skip
test_too_many = told("have the worker decode any number of small pictures", "a request holds 16 of them at most",
    "array_above_max_length", [SMALL] * (MAX_MEDIA + 1), max_prompt_tokens=100_000)  # fmt: skip
test_cut_off = told("send a picture whose head alone is right", "a picture that cannot be decoded is the caller's error",
    "invalid_image", [shown(png(28, 28)[:40]), LOOK], most=1)  # fmt: skip
test_many_scans = told("send a picture of many near-empty scans, each of which costs a pass over all of it",
    "a photo's scans are counted before anything is decoded", "invalid_image", [scanned(200_000), LOOK])  # fmt: skip
_TWICE: Final = "{% for m in messages %}{{ m.content }}{% if 'again' in m.content %}{{ m.content }}{% endif %}{% endfor %}"
test_twice = told("have the template show a picture twice, or not at all", "a template shows each picture once, in order",
    "unsupported_value", [SMALL, {"type": "text", "text": "again"}], template=_TWICE)  # fmt: skip


def _posing(text: str) -> Callable[[Stage], bytes]:
    return lambda stage: message(stage, [SMALL, {"type": "text", "text": text}])


@attack("write what stands for a picture in a prompt, to show one where none was", "client",
        "a mark has 128 random bits of its request", gain="nothing; the text stays text",
        cases=["i0;", "i1;", f"{'0' * 32}i0;"])  # fmt: skip
async def test_a_mark(stage: Stage, gateway: GatewayOwner, case: str) -> None:
    with closing(SeeingEngine(name=MODEL)) as engine:
        await stage.worker(create_app([engine]), models=[MODEL])
        answer = await gateway.submit(_posing(case)(stage))
        assert (answer.status, engine.reader.read_so_far) == (200, 1)
        assert json.dumps(case)[1:-1] in answer.body.decode()
