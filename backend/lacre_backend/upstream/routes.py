"""Decides which requests may be forwarded to the upstream: an allow-list of methods and paths.

Rules:
- A path is compared as received, character by character. Nothing is decoded, so the upstream reads exactly what matched here.
- A `*` matches one whole segment of characters that need no escape (RFC 3986 section 3.3). It does not match a dot segment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

ANY: Final = "*"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SEGMENT: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._~!$&'()*+,;=:@-]+")
_PATH: Final = re.compile(r"(?:/[\x21-\x22\x24-\x2e\x30-\x3e\x40-\x7e]+)+|/")  # no empty segment, no query, no fragment


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of the list. segments: of the path, between its slashes."""

    method: str
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`METHOD /path`. Raises ValueError."""
        method, _, path = text.partition(" ")
        if method not in METHODS or not _PATH.fullmatch(path):
            raise ValueError("a route")
        return cls(method, tuple(path[1:].split("/")))

    def takes(self, path: str) -> bool:
        """path: as it was sent, without its query."""
        segments = path[1:].split("/")
        return len(segments) == len(self.segments) and all(map(_fits, self.segments, segments))


def _fits(wanted: str, segment: str) -> bool:
    return segment == wanted or (wanted == ANY and _SEGMENT.fullmatch(segment) is not None)
