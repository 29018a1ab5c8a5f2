"""Shows an answer as it arrives: plain for a pipe, Markdown for a terminal.

A terminal cannot redraw lines that have scrolled off. So a finished block of Markdown is printed for good, and only the last
block, which still grows, is redrawn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from markdown_it import MarkdownIt
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from lacre.chat.blocks import ended_blocks
from lacre.chat.stream_sync import ChatStream
from lacre.cli.output import printable, waiting, write

REDRAW: Final = 0.08  # seconds: faster redraws flicker
# Rich's own settings, except that HTML and link definitions are plain text.
_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")


class Display(Protocol):
    """Where an answer's pieces go. When its context ends, it has shown all of them, however the answer ended."""

    def add(self, piece: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None: ...


class PlainOutput:
    """The text unchanged, and a line end after it. At a terminal, its control characters become visible."""

    def __init__(self) -> None:
        self._begun = False

    def add(self, piece: str) -> None:
        self._begun = True
        write(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self._begun:
            write("\n")


class Rendered:
    """Markdown, block by block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")
        self._growing = ""
        self._drawn_at = 0.0

    def add(self, piece: str) -> None:
        self._growing += printable(piece)
        end = ended_blocks(self._growing)
        if end:
            self._console.print(_markdown(self._growing[:end]))
            self._growing = self._growing[end:]
        if end or time.monotonic() - self._drawn_at >= REDRAW:
            self._live.update(_markdown(self._growing), refresh=True)
            self._drawn_at = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        if self._growing.strip():
            self._console.print(_markdown(self._growing))


def _markdown(text: str) -> RenderableType:
    """Rendered so that all of the text is visible. Rich by itself drops HTML, comments and link definitions."""
    drawn = Markdown("", hyperlinks=False)  # a link shows its address: a model must not hide where it leads
    drawn.markup, drawn.parsed = text, _PARSER.parse(text)
    return drawn


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast an answer arrived: seconds until its first piece, and tokens per second after it."""

    first: float
    rate: float


def show(stream: ChatStream, display: Display) -> Throughput:
    """Shows the stream's text to its end. Raises what the stream raises, after showing all that arrived."""
    began = time.monotonic()
    with waiting("sealed; waiting for the first token"):
        piece = next(stream, None)
    first = time.monotonic()
    with display:
        while piece is not None:
            display.add(piece)
            piece = next(stream, None)
    later = time.monotonic() - first
    tokens = max(stream.reply().receipt.completion_tokens - 1, 0)
    return Throughput(first - began, tokens / later if later > 0 else 0.0)
