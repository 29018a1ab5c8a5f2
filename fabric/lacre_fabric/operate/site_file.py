"""Reads `site.json`, which `lacre up` or a person wrote, and files with a time."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lacre.errors import InvalidMessage, SettingsError
from lacre.runtime.json_objects import parse_object

_LONG_AGO: Final = 1.0  # seconds since the epoch: it happened, and is due again


def read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), "it")
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read ({exc.strerror}): start `lacre up` on this state first") from exc
    except InvalidMessage as exc:
        raise SettingsError(f"{path} is damaged ({exc}): correct it, or remove it and start `lacre up` on this state") from exc


def member(path: Path, name: str) -> Any:
    try:
        return read_json(path)[name]
    except KeyError:
        raise SettingsError(f"{path} has no `{name}`: add it, or start `lacre up` on this state") from None


def are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def time_in(path: Path) -> float:
    """The time that a file holds, in seconds since the epoch; 0 without the file. A damaged one counts as very old."""
    if not path.exists():
        return 0.0
    with suppress(ValueError):
        if math.isfinite(at := float(path.read_text())) and at > 0:
            return at
    return _LONG_AGO
