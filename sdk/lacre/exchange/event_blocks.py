"""Splits the bytes of an event stream into its events (WHATWG HTML section 9.2.6), wherever the network cut them.

A line ends by LF, CR or CRLF, and the stream may begin with a byte order mark. An event ends by a blank line.
No byte is copied or looked at again for each piece: a long event in small pieces costs no more than in one.
"""

from __future__ import annotations

from typing import Final

DONE: Final = b"[DONE]"  # the data of the event that ends a stream in OpenAI's format
MAX_EVENT: Final = 2**20  # bytes of one event that readers wait for; a whole tool call has some thousand
_BOM: Final = b"\xef\xbb\xbf"
_END: Final = b"\n\n"


class EventBlocks:
    """pending: bytes of the unfinished event; the reader bounds them."""

    def __init__(self) -> None:
        self.pending = bytearray()
        self._began = False
        self._after_cr = False  # an LF that comes next belongs to a line end that was already read

    def feed(self, data: bytes) -> list[list[bytes]]:
        """The complete events, each as its lines. It skips blank lines and comments."""
        if not data:
            return []
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        sought = max(0, len(self.pending) - 1)  # half of an end may have come before
        self.pending += data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not self._began:
            if len(self.pending) < len(_BOM):  # no event is as short
                return []
            self._began, sought = True, 0
            if self.pending.startswith(_BOM):
                del self.pending[: len(_BOM)]
        return [[line for line in block.split(b"\n") if line and not line.startswith(b":")] for block in self._ended(sought)]

    def _ended(self, sought: int) -> list[bytes]:
        blocks, at = [], 0
        while (end := self.pending.find(_END, sought)) >= 0:
            blocks.append(bytes(self.pending[at:end]))
            at = sought = end + len(_END)
        del self.pending[:at]
        return blocks


def field(lines: list[bytes], name: bytes) -> list[bytes]:
    """The values of a field, in order; of `data`, one for each line."""
    begin = name + b":"
    return [line[len(begin) :].removeprefix(b" ") for line in lines if line.startswith(begin)]


def data_of(lines: list[bytes]) -> bytes:
    """The event's data; empty for an event without any."""
    return b"\n".join(field(lines, b"data"))
