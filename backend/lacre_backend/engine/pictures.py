"""Pictures of callers as pixels, by Pillow: whole, upright and of a bounded size.

Rules:
- A picture's size is checked again, as the decoder reads it, before any pixel is decoded. So are the scans of a JPEG.
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
_OF_SCANS: Final = ("JPEG", "MPO")  # Pillow calls a JPEG of several pictures MPO
MAX_PIXELS: Final = 2**24  # three bytes each as colours, and four while they are decoded: 64 MiB
MAX_RATIO: Final = 200  # of the sides: scaled to what an encoder takes, the short one must not vanish
MAX_SCANS: Final = 100  # of a JPEG: each is a pass over all pixels (7 ms for 2**24); encoders write a dozen at most
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


def has_many_scans(jpeg: bytes) -> bool:
    """More than `MAX_SCANS`. A scan begins with its mark and a length below 256 (ITU T.81, B.2.3).

    In compressed data no other mark looks like it. In metadata it may by chance, once in 16 MiB.
    """
    return jpeg.count(b"\xff\xda\0") > MAX_SCANS


def decoded(data: bytes) -> Pixels:
    """Transparent parts become white. Raises ImageRefused."""
    from PIL import Image, ImageOps  # noqa: PLC0415 - an extra

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageRefused(f"it has more than {MAX_PIXELS:,} pixels")
            if max(opened.size) > MAX_RATIO * min(opened.size):
                raise ImageRefused(f"one of its sides is over {MAX_RATIO} times as long as the other")
            if opened.format in _OF_SCANS and has_many_scans(data):
                raise ImageRefused(f"it has more than {MAX_SCANS} scans")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                coloured = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
            picture = upright.convert("RGB")
            return Pixels(picture.width, picture.height, picture.tobytes())
    except (*_BROKEN, Image.DecompressionBombError):
        raise ImageRefused("it is broken, or cut off") from None
