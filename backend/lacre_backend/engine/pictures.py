"""Pictures of callers as pixels, by Pillow: whole, upright and of a bounded size.

Rules:
- A picture's size is checked again, as the decoder reads it, before any pixel is decoded.
- Only the formats that the API names are tried, and only the first frame is decoded.
- Pillow is an extra, which only a worker with a projector needs.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from lacre_backend.engine.protocol import ImageRefused

FORMATS: Final = ("PNG", "JPEG", "GIF", "WEBP")
MAX_PIXELS: Final = 2**24  # three bytes each as colours, and four while they are decoded: 64 MiB
MAX_RATIO: Final = 200  # of the sides: scaled to what an encoder takes, the short one must not vanish
# What Pillow raises for bytes that are not a picture, or a broken one
_BROKEN: Final = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, Warning, struct.error,
                  zlib.error, MemoryError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pixels:
    """rgb: three bytes for each pixel, row by row from the top."""

    width: int
    height: int
    rgb: bytes = field(repr=False)


def available() -> bool:
    """Whether Pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def decoded(data: bytes) -> Pixels:
    """Transparent parts become white. Raises ImageRefused."""
    from PIL import Image, ImageOps  # noqa: PLC0415 - an extra

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageRefused(f"it has more than {MAX_PIXELS:,} pixels")
            if max(opened.size) > MAX_RATIO * min(opened.size):
                raise ImageRefused(f"one of its sides is over {MAX_RATIO} times as long as the other")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                coloured = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
            picture = upright.convert("RGB")
            return Pixels(picture.width, picture.height, picture.tobytes())
    except (*_BROKEN, Image.DecompressionBombError):
        raise ImageRefused("it is broken, or cut off") from None
