"""Lengths that say little: how far a message is padded under the shape `pad`. Only arithmetic; `docs/wire.md` specifies it.

An observer learns from a length only its bucket, and the buckets are few: 68 between nothing and the longest request. That is
some 6 bits. The plain length of a long prompt tells up to 23.
"""

from __future__ import annotations

from typing import Final, Literal

from lacre.errors import UsageError
from lacre.wire.framing import MAX_CHUNK

Shape = Literal["pad", "none"]
SHAPES: Final[tuple[Shape, ...]] = ("pad", "none")  # the shapes of this version, the default first

# Most prompts and short answers are shorter, and X-Wing alone adds 1127 bytes to a request.
SMALLEST: Final = 4096
# Each bucket is this many percent longer than the one before, so no message grows by more.
STEP_PERCENT: Final = 12
# The longest message of full chunks that stays below 7 MiB when sealed under any suite: the last bucket of requests.
LARGEST_REQUEST: Final = 447 * MAX_CHUNK
# A stream's record holds a whole number of these. A token's event in OpenAI's format has some 260 bytes, mostly the same for
# each token. Twice that leaves room for the longest tokens, or for a model's name of 128. It divides a full chunk.
UNIT: Final = 512


def shape_named(name: str) -> Shape:
    """Raises UsageError for a shape that this version does not have."""
    for shape in SHAPES:
        if shape == name:
            return shape
    raise UsageError(f"there is no shape {name!r}: choose one of {', '.join(SHAPES)}")


def bucket(length: int) -> int:
    """The smallest bucket that holds `length` bytes: at most `STEP_PERCENT` longer above `SMALLEST`. Never decreasing."""
    size = SMALLEST
    while size < length:
        size += size * STEP_PERCENT // 100
    return size


def request_length(length: int) -> int:
    """The padded length of a request's BHTTP message. A message beyond the largest bucket keeps its length: sealing will refuse
    it.
    """
    return max(length, min(bucket(length), LARGEST_REQUEST))


def whole_units(length: int) -> int:
    """`length`, rounded up to whole units."""
    return -(-length // UNIT) * UNIT
