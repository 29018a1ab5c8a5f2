"""The chat page's part of `lacre proxy`: its link, the browser, and the prices that it shows."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lacre.cli.link_file import LinkFile
from lacre.cli.surroundings import read_file, utf8
from lacre.errors import SettingsError
from lacre.runtime import folders, tasks
from lacre.transport.browser_grant import has_browser
from lacre.transport.login import OsKeyring

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from lacre.client import AsyncClient

FOLDER: Final = "chats"  # of the encrypted history, below this user's state


class PageOpening:
    """The page of one proxy. origin: where it is served. browser: whether to open it for the person."""

    def __init__(self, origin: str, *, browser: bool) -> None:
        from lacre.page.door import PageDoor

        self.door = PageDoor(origin, self._remove)
        self._browser = browser
        self._file: LinkFile | None = None

    def app(self, client: AsyncClient, pinned: Mapping[str, str] | None, *, priced: bool) -> ASGIApp:
        from lacre.page.app import Page, create_page
        from lacre.page.chats import Chats
        from lacre.page.history import ChatHistory

        history = ChatHistory(folders.state() / FOLDER, OsKeyring.find())
        return create_page(Page(client, self.door, Chats(history), priced=priced, pinned=pinned or {}))

    @contextmanager
    def shown(self, link: str) -> Iterator[None]:
        """Opens the browser."""
        if not self._browser or not has_browser():
            yield
            return
        with LinkFile(self.door.cookie, link, instead="use --no-browser") as self._file:
            tasks.detach("opening the browser", asyncio.to_thread(self._file.open))
            yield

    def _remove(self) -> None:
        """The link was used."""
        if self._file is not None:
            self._file.remove()


def prices_in(path: Path) -> dict[str, Any]:
    """The table `prices` of a TOML file. Raises SettingsError."""
    try:
        found = tomllib.loads(utf8(read_file(path), str(path))).get("prices")
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{path} is not TOML ({exc})") from exc
    if not isinstance(found, dict):
        raise SettingsError(f"{path} has no table `prices`: write one as in the gateway's plans.toml")
    return found
