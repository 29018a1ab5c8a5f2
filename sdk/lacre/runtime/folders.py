"""Which folder this user's state belongs in, and which paths a caller may give. Nothing is made or opened here."""

from __future__ import annotations

import os
from pathlib import Path

from lacre.errors import SettingsError, UsageError

NAME = "lacre"


def state() -> Path:
    """`$XDG_STATE_HOME/lacre`, or `~/.local/state/lacre` where that is unset, empty or relative (XDG Base Directory 0.8).

    Elsewhere than on Linux, it is the platform's own folder for state. Raises SettingsError if this user has no home folder.
    """
    import platformdirs  # noqa: PLC0415 - `import lacre` need not wait for it

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
        raise SettingsError(f"{path} cannot be resolved, for there is no such home folder: write the whole path") from exc


_NO_HOME = (
    "this user has no home folder to keep state in: set XDG_STATE_HOME to a folder that can be written, or pass "
    "memory=lacre.VersionMemory() (or --state for a command that has it)"
)


def given(path: object, name: str) -> Path:
    """The path that a caller gave. Raises UsageError for what no system takes as a path."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{name}: a path is expected, not {type(path).__name__}")
    try:
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UsageError(f"{name}: a path as text is expected, not bytes")
        if "\0" in os.fsencode(text).decode("latin-1") or not text:
            raise UsageError(f"{name}: a path is not empty and holds no null character")
    except UnicodeEncodeError as exc:
        raise UsageError(f"{name}: the path has characters that this system's paths cannot have") from exc
    return Path(text)
