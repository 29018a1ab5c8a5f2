"""A request as a client would write it, and what it opens of the answer, without the SDK: for tests that bend either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_REQUEST, KeyConfig, SealedHeader, Suite
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre_fabric.work.frames import Frame, FrameKind

CHAT = "/v1/chat/completions"


class Sealed(NamedTuple):
    """A sealed request, its header, and what opens the answer."""

    body: bytes
    header: SealedHeader
    opener: ResponseOpener


def seal(config: KeyConfig, message: bhttp.Request, suite: Suite | None = None) -> Sealed:
    return Sealed(*seal_request(config, bhttp.encode_request(message), suite))


def request(content: bytes = b"{}", **parts: Any) -> bhttp.Request:
    """What stands inside the seal. parts: of `bhttp.Request`, in place of the usual ones."""
    usual = {"method": "POST", "scheme": "https", "authority": "lacre.invalid", "path": CHAT}
    return bhttp.Request(content=content, **{**usual, **parts})


def outer_headers(token: str, **changes: str | None) -> dict[str, str]:
    """The headers around the seal; `None` takes one away. Names with underscores for dashes."""
    headers: dict[str, str | None] = {
        "authorization": f"Bearer {token}", "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": "default",
        "lacre-model": "smollm2-135m", "lacre-action": "chat", "lacre-max-tokens": "256", "lacre-shape": "none",
    }  # fmt: skip
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    return {name: value for name, value in headers.items() if value is not None}


def opened(opener: ResponseOpener, body: bytes) -> bytes:
    """The plaintext of a whole sealed answer; raises where it is not whole."""
    return b"".join([*opener.feed(body), *opener.close()])


@dataclass
class Answer:
    """What came back: the frames, and what the client opened of them."""

    frames: list[Frame]
    opener: ResponseOpener

    @property
    def problem(self) -> str | None:
        """The type in the error frame."""
        last = self.frames[-1]
        return last.payload.decode() if last.kind is FrameKind.ERROR else None

    def sizes(self) -> list[int]:
        return [len(frame.payload) for frame in self.frames if frame.kind is FrameKind.DATA]

    def opened(self) -> tuple[bhttp.ResponseHead, bytes, dict[str, str]]:
        """Status and headers, content, trailers. Raises TruncatedStream where it is not whole."""
        decoder = bhttp.ResponseDecoder()
        events: list[bhttp.Event] = []
        for frame in self.frames:
            if frame.kind is FrameKind.DATA:
                events += [event for record in self.opener.feed(frame.payload) for event in decoder.feed(record)]
        events += [event for record in self.opener.close() for event in decoder.feed(record)] + decoder.close()
        [head] = [event for event in events if isinstance(event, bhttp.ResponseHead)]
        [end] = [event for event in events if isinstance(event, bhttp.End)]
        return head, b"".join(event.content for event in events if isinstance(event, bhttp.Data)), dict(end.trailers)
