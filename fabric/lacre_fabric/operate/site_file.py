"""Reads `site.json`, which `lacre up` or a person wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lacre.errors import InvalidMessage, SettingsError
from lacre.runtime.json_objects import parse_object


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
