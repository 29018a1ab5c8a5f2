"""Images on their way through a chat template, which knows texts alone: a mark stands for each.

Rules:
- A mark has 128 random bits of this request, so no text of a caller is one.
- The template must show each image once, in order. Otherwise the request is refused: an answer to another prompt helps nobody.
- Images are read after the template has run, one by one, and only as long as the prompt can fit.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from lacre_backend.api import media
from lacre_backend.api.errors import RequestRefused, context_length_exceeded
from lacre_backend.api.template.pieces import Piece, Shown
from lacre_backend.engine.protocol import ImageRefused, ModelInfo


class ImageMarks:
    """The images of one request, in order."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._mark = re.compile(self._nonce + "i([0-9]+);")
        self._found: list[media.Media] = []

    def of(self, image: media.Media) -> str:
        """The text that stands for it."""
        self._found.append(image)
        return f"{self._nonce}i{len(self._found) - 1};"

    async def shown(self, model: ModelInfo, pieces: Sequence[Piece]) -> list[Piece | Shown]:
        """The pieces of a prompt with the images at their places. Raises `RequestRefused`, or `EngineError`."""
        if not self._found:
            return list(pieces)
        split = [list(self._split(piece)) if isinstance(piece, str) else [piece] for piece in pieces]
        flat = [part for parts in split for part in parts]
        if [part for part in flat if isinstance(part, int)] != list(range(len(self._found))):
            raise RequestRefused(
                "The model's chat template does not show each image once, in order. Send fewer images, or one a message.",
                code="unsupported_value",
                param="messages",
            )
        read: list[Piece | Shown] = []
        tokens = 0
        for part in flat:
            if isinstance(part, int):
                shown = await self._read(model, self._found[part])
                tokens += shown.image.tokens
                if tokens >= model.n_ctx:
                    raise context_length_exceeded(model.n_ctx, None, "messages")
                read.append(shown)
            else:
                read.append(part)
        return read

    def _split(self, text: str) -> list[str | int]:
        # re.split with one group gives: text, number, text, ..., text.
        parts = self._mark.split(text)
        return [part for i, each in enumerate(parts) if (part := int(each) if i % 2 else each) != ""]

    async def _read(self, model: ModelInfo, image: media.Media) -> Shown:
        if model.images is None:
            raise media.not_taken(model.name, image)
        try:
            return Shown(await model.images.read(image.data))
        except ImageRefused as refusal:
            raise RequestRefused(f"Invalid '{image.at}': {refusal}.", code="invalid_image", param=image.at) from None
