"""Which folder holds this user's state, and which paths a caller may pass. Nothing is created or opened here."""

from __future__ import annotations

import os
from pathlib import Path

from lacre.errors import SettingsError, UsageError

NAME = "lacre"


def state() -> Path:
    """`$XDG_STATE_HOME/lacre`, or `~/.local/state/lacre` if that is unset, empty or relative (XDG Base Directory 0.8).

    On other systems than Linux, it is the platform's own folder for state. Raises SettingsError if this user has no home
    folder.
    """
    import platformdirs  # noqa: PLC0415 - keeps `import lacre` fast

    try:
        found = platformdirs.user_state_path(NAME, appauthor=False)
    except RuntimeError as exc:
        raise SettingsError(_NO_HOME) from exc
    if not found.is_absolute():
        raise SettingsError(_NO_HOME)
    return found


def home() -> Path:
    """Raises SettingsError."""
    return expanded(Path("~"))


def expanded(path: Path) -> Path:
    """The path, with `~` or `~user` at its start resolved. Raises SettingsError."""
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise SettingsError(f"{path} cannot be resolved, because there is no such home folder: write the whole path") from exc


_NO_HOME = (
    "this user has no home folder for state: set XDG_STATE_HOME to a writable folder, or pass "
    "memory=lacre.VersionMemory() (or --state for a command that has it)"
)


def given(path: object, name: str) -> Path:
    """The path that a caller passed. Raises UsageError for a value that no system takes as a path."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{name} must be a path, not {type(path).__name__}")
    try:
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UsageError(f"{name} must be a path as text, not bytes")
        if "\0" in os.fsencode(text).decode("latin-1") or not text:
            raise UsageError(f"{name} must be a path that is not empty and holds no null character")
    except UnicodeEncodeError as exc:
        raise UsageError(f"{name}: the path has characters that this system's paths cannot have") from exc
    return Path(text)
