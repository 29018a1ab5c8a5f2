"""An echo that also reads pictures: each takes as many tokens as its head says, one for every 28 pixels square."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from lacre_backend.engine.protocol import ImageRefused
from parts.echo_engine import EchoEngine

SIDE: Final = 28  # pixels of a token
_END: Final = b"IEND"  # begins the last chunk of a PNG file


@dataclass(frozen=True, slots=True)
class Counted:
    """A picture that was read."""

    tokens: int


class PngReader:
    """An `ImageReader` of PNG files. read_so_far: how many it was asked to read."""

    def __init__(self) -> None:
        self.read_so_far = 0

    async def read(self, data: bytes) -> Counted:
        self.read_so_far += 1
        if _END not in data[-12:]:
            raise ImageRefused("it is broken, or cut off")
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        return Counted(-(-width // SIDE) * -(-height // SIDE))

    def close(self) -> None:
        """It holds nothing."""


class SeeingEngine(EchoEngine):
    def __init__(self, *, name: str, template: str | None = None) -> None:
        """template: of chats, in place of the echo's."""
        super().__init__(name=name)
        self.reader = PngReader()
        self.model = replace(self.model, images=self.reader, chat_template=template or self.model.chat_template)
