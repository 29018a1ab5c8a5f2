"""Opens a link with a secret in this machine's browser.

Rules: the browser gets it by a private file, because every user of the machine can read a program's arguments. The file is
removed once the link was used, or leads nowhere.
"""

from __future__ import annotations

import webbrowser
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Self

from lacre.errors import SettingsError
from lacre.runtime import folders, private_files


class LinkFile:
    """A context manager: the file exists in its block. name: of the file, in this user's state folder.

    instead: what to do without it, for the error.
    """

    def __init__(self, name: str, link: str, *, instead: str) -> None:
        self.path: Path = folders.state() / f"open-{name}.html"
        self._link, self._instead = link, instead

    def __enter__(self) -> Self:
        """Raises SettingsError."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_files.replace(self.path, _leading(self._link))
        except OSError as exc:
            raise SettingsError(f"{self.path} cannot be written ({exc.strerror}): {self._instead}") from exc
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _traceback: TracebackType | None) -> None:
        self.remove()

    def open(self) -> bool:
        """Whether a browser was found. A browser in this terminal ends only when the person leaves it."""
        return webbrowser.open(self.path.as_uri())

    def remove(self) -> None:
        """A signal ends the process without a last word: then the file stays, and its link leads nowhere."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            return


def _leading(link: str) -> bytes:
    """A page that goes to the link."""
    target = escape(link)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="referrer" content="no-referrer"><title>Lacre</title>'
        f'<meta http-equiv="refresh" content="0;url={target}"><p><a href="{target}">Open the page</a>'
    ).encode()
