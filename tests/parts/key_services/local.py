"""The local key file."""

from __future__ import annotations

import secrets
from pathlib import Path

from parts.key_services import Key


class Local:
    secrets: tuple[str, ...] = ()
    absent = ""
    revokes = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment: dict[str, str] = {}

    def key(self) -> Key:
        path = self._folder / f"{secrets.token_hex(4)}.kms"
        return Key(f"file:{path}", str(path))

    def revoke(self, key: Key) -> None:
        Path(key.name).unlink()

    def close(self) -> None:
        """Nothing runs."""
