"""Media in a body that is forwarded: only what the body itself holds.

Servers such as vLLM and llama.cpp's fetch an image, audio or a file from the address that a caller gives. So a sealed request
would dial out from the operator's network, to any address of it, and tell that address of the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lacre_backend.api.errors import RequestRefused

# Members of content parts that hold an address, or an object with one.
_ADDRESSED: Final = ("image_url", "audio_url", "video_url", "file_url", "source", "image", "video", "audio")
_SPOKEN: Final = ("messages", "input", "system")  # members of a body that hold content


def check_media(body: Mapping[str, Any]) -> None:
    """body: of a chat, in any API's words. Raises `RequestRefused`."""
    for name in _SPOKEN:
        for param, address in _addresses(body.get(name), name):
            if address[:5].lower() != "data:":
                raise RequestRefused(
                    "Only data: URLs are forwarded: a sealed request makes nobody dial out. Send the file itself, in base64.",
                    code="unsupported_value",
                    param=param,
                )


def _addresses(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """The addresses of media in messages, items, parts and results of tools, each with its place."""
    waiting = [(value, at)]
    while waiting:
        each, path = waiting.pop()
        if isinstance(each, list):
            waiting += [(item, f"{path}[{i}]") for i, item in enumerate(each)]
        elif isinstance(each, dict):
            # What tools are called with is theirs: it may name addresses that nobody fetches for it.
            waiting += [(each[name], f"{path}.{name}") for name in ("content", "output") if name in each]
            for name in _ADDRESSED:
                held = each.get(name)
                if isinstance(held, str) and name != "source":  # of a search result: a name for citations
                    yield f"{path}.{name}", held
                elif isinstance(held, dict) and isinstance(held.get("url"), str):
                    yield f"{path}.{name}.url", held["url"]
