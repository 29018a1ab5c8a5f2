"""Cuts the bytes of an event stream into its events (WHATWG HTML section 9.2.6), wherever the network has cut them.

A line ends by LF, CR or CRLF, and the stream may begin with a byte order mark. An event ends by a blank line.
"""

from __future__ import annotations

from typing import Final

_BOM: Final = b"\xef\xbb\xbf"


class EventBlocks:
    """pending: bytes of the event that has not ended; the reader bounds them."""

    def __init__(self) -> None:
        self.pending = b""
        self._began = False
        self._after_cr = False  # the next LF belongs to a line end that was seen already

    def feed(self, data: bytes) -> list[list[bytes]]:
        """The events that have ended, each as its lines. Blank ones and comments are left out."""
        if not data:
            return []
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        *blocks, rest = (self.pending + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n\n")
        if not self._began and (blocks or len(rest) >= len(_BOM)):
            blocks, rest = self._without_bom(blocks, rest)
        self.pending = rest
        return [[line for line in block.split(b"\n") if line and not line.startswith(b":")] for block in blocks]

    def _without_bom(self, blocks: list[bytes], rest: bytes) -> tuple[list[bytes], bytes]:
        self._began = True
        first, *others = (*blocks, rest)
        *blocks, rest = (first.removeprefix(_BOM), *others)
        return blocks, rest


def field(lines: list[bytes], name: bytes) -> list[bytes]:
    """The values of a field, in order; of `data`, one for each line of it."""
    begin = name + b":"
    return [line[len(begin) :].removeprefix(b" ") for line in lines if line.startswith(begin)]
