r"""Writes nats-server's configuration as text that the server parses to the same values.

Rules:
- The text looks like JSON, but NATS has its own grammar. Its strings support \t, \n, \r, \", \\ and \xHH, which is one byte.
  JSON's \u is an error there.
- A quoted name supports no escapes, so only plain names are written.
- Quoted text has no variables: `$HOME` in a path stays as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from lacre.errors import SettingsError

_NAME: Final = re.compile(r"[ !#-\[\]-~]+")  # printable ASCII without the quote and the backslash
_PLAIN: Final = frozenset(range(0x20, 0x7F)) - {ord('"'), ord("\\")}


def encode(config: Mapping[str, object]) -> bytes:
    """The configuration as ASCII. A string becomes the bytes of a path (`os.fsencode`).

    Raises SettingsError for values that this format cannot express.
    """
    return (_value(config, "\n") + "\n").encode("ascii")


def lines(config: Mapping[str, object]) -> bytes:
    """The members without outer braces, to embed in a file; one or more lines each. Raises SettingsError."""
    return "".join(f"{_name(key)}: {_value(value, chr(10))}\n" for key, value in config.items()).encode("ascii")


def _value(value: object, line: str) -> str:
    """line: the line break before the closing brace."""
    inner = f"{line} "
    if isinstance(value, Mapping):
        return _block("{", [f"{_name(key)}: {_value(one, inner)}" for key, one in value.items()], "}", line)
    if isinstance(value, list | tuple):
        return _block("[", [_value(one, inner) for one in value], "]", line)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    raise SettingsError(f"nats-server's configuration cannot hold a {type(value).__name__}: write text or a number")


def _block(begin: str, parts: list[str], end: str, line: str) -> str:
    return f"{begin}{line} " + f",{line} ".join(parts) + f"{line}{end}" if parts else begin + end


def _name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise SettingsError(f"{name!r} cannot be a name in nats-server's configuration: use printable ASCII, without quotes")
    return f'"{name}"'


def _text(text: str) -> str:
    try:
        content = os.fsencode(text)
    except UnicodeEncodeError as exc:
        raise SettingsError(f"{text!r} contains an invalid character (a lone surrogate): correct it") from exc
    return '"' + "".join(chr(byte) if byte in _PLAIN else f"\\x{byte:02X}" for byte in content) + '"'
