"""Which part of a growing Markdown text is finished: a terminal prints it for good, and the chat page renders it once."""

from __future__ import annotations

import re
from typing import Final

_FENCE: Final = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)


def ended_blocks(text: str) -> int:
    """How much of the text is finished blocks: up to the last empty line outside a fence."""
    end = text.rfind("\n\n")
    while end >= 0 and len(_FENCE.findall(text[:end])) % 2:
        end = text.rfind("\n\n", 0, end)
    return end + 2 if end >= 0 else 0
