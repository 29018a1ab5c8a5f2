"""JSON to show: text of others in it cannot control a terminal, and cannot look like another text.

JSON itself escapes only what is below U+0020. The rest is escaped here, so readers of the JSON get the same values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

# DEL and C1 control a terminal. Two others end a line for some readers, and the next ones turn the direction of a text around.
# A surrogate by itself, which JSON can hold, is in no encoding.
UNSHOWN: Final = "\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSHOWN: Final = re.compile(f"[{UNSHOWN}]")


def shown(
    value: Any, *, indent: int | None = None, ascii_only: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """The value as JSON. ascii_only: everything beyond ASCII is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=default)
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
