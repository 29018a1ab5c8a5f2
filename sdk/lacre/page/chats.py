"""The chats of the page: in this process's memory, and encrypted on disk if the person turned history on.

Rules:
- Without history, nothing of a chat touches a disk. The chats end with the proxy; a reload of the page finds them.
- A chat is the page's own document. Here it only has an id, a title, a revision and a size.
- A change must name the revision that it replaces, so two windows do not overwrite each other.
- Each chat, their number and their sum are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from lacre.errors import LacreError, MessageTooLarge, SettingsError, UsageError
from lacre.page.history import MAX_CHAT, MAX_CHATS, ChatHistory, Unreadable
from lacre.runtime.json_objects import parse_object

MAX_ALL: Final = 128 * 1024 * 1024  # bytes of all chats
MAX_TITLE: Final = 200  # characters
MAX_FOUND: Final = 100  # results of a search
AROUND: Final = 60  # characters shown on each side of a found word
ID: Final = re.compile(r"[0-9a-f]{32}")


class StaleChat(Exception):
    """Another window has changed the chat since."""


@dataclass(slots=True)
class _Chat:
    title: str
    updated: float
    revision: int
    content: bytes = field(repr=False)


class Chats:
    """history: of this user; it may be off."""

    def __init__(self, history: ChatHistory) -> None:
        self.history = history
        self.unreadable: tuple[Unreadable, ...] = ()
        self._chats: dict[str, _Chat] = {}

    def heads(self) -> list[dict[str, Any]]:
        """What a list of chats shows, the newest first."""
        return [_head(name, chat) for name, chat in self._newest()]

    def read(self, name: str) -> bytes | None:
        return self._chats[name].content if name in self._chats else None

    def write(self, name: str, content: bytes, replaces: int) -> int:
        """Keeps a chat, and returns its new revision. Raises StaleChat, UsageError, MessageTooLarge, and SettingsError if it
        cannot be written to disk: it is in memory by then.
        """
        new, old = _chat(name, content), self._chats.get(name)
        if old is not None and old.revision != replaces:
            raise StaleChat
        if old is None and len(self._chats) >= MAX_CHATS:
            raise MessageTooLarge(f"there are {MAX_CHATS} chats: export and delete some")
        if self._size() - (0 if old is None else len(old.content)) + len(content) > MAX_ALL:
            raise MessageTooLarge(f"all chats together may hold {MAX_ALL} bytes: export and delete some")
        new.revision = replaces + 1 if old is None else old.revision + 1
        self._chats[name] = new
        self.history.save(name, content)
        return new.revision

    def delete(self, name: str) -> bool:
        """Also from disk. Whether there was one."""
        self.history.delete(name)
        return self._chats.pop(name, None) is not None

    def find(self, words: str) -> list[dict[str, Any]]:
        """Chats with this text in their title or their messages, with the place. Letter case makes no difference."""
        wanted = words.strip().casefold()
        found = []
        for name, chat in self._newest() if wanted else []:
            place = next((text for text in _texts(chat) if wanted in text.casefold()), None)
            if place is not None:
                at = max(0, place.casefold().find(wanted) - AROUND)
                around = " ".join(place[at : at + len(wanted) + 2 * AROUND].split())
                found.append({**_head(name, chat), "around": ("…" if at else "") + around})
        return found[:MAX_FOUND]

    def keep(self) -> None:
        """History was opened: reads the chats on disk, and writes those that are only in memory.

        Raises SettingsError if one of these cannot be written: all are in memory by then.
        """
        stored, unreadable = self.history.load()
        chats: dict[str, _Chat] = {}
        for name, content in stored.items():
            try:
                chats[name] = _chat(name, content)
            except LacreError as exc:
                unreadable += (Unreadable(f"{name}.chat", str(exc)),)
        begun = {name: chat for name, chat in self._chats.items() if name not in chats or chats[name].updated < chat.updated}
        self._chats, self.unreadable = chats | begun, unreadable
        failed: SettingsError | None = None
        for name, chat in begun.items():
            try:
                self.history.save(name, chat.content)
            except SettingsError as exc:
                failed = failed or exc
        if failed is not None:
            raise failed

    def forget(self) -> None:
        """Deletes all chats, in memory and on disk, and turns history off. Raises SettingsError."""
        self._chats.clear()
        self.unreadable = ()
        self.history.forget()

    def _size(self) -> int:
        return sum(len(chat.content) for chat in self._chats.values())

    def _newest(self) -> list[tuple[str, _Chat]]:
        """The newest first. A copy: other threads change the chats meanwhile."""
        return sorted(self._chats.items(), key=lambda item: -item[1].updated)


def _head(name: str, chat: _Chat) -> dict[str, Any]:
    return {"id": name, "title": chat.title, "updated": chat.updated, "revision": chat.revision}


def _chat(name: str, content: bytes) -> _Chat:
    if len(content) > MAX_CHAT:
        raise MessageTooLarge(f"a chat may hold {MAX_CHAT} bytes: begin another one, or attach smaller files")
    document = parse_object(content, "the chat")
    title, updated = document.get("title"), document.get("updated")
    if ID.fullmatch(name) is None or document.get("id") != name:
        raise UsageError("a chat's id has 32 hexadecimal digits, and its document has the same one")
    if not isinstance(title, str) or isinstance(updated, bool) or not isinstance(updated, int | float) or not _is_time(updated):
        raise UsageError("a chat has a title and a time")
    return _Chat(title[:MAX_TITLE], float(updated), 1, content)


def _is_time(updated: float) -> bool:
    """Whether JSON can hold it as a float."""
    return abs(updated) < 2**53


def _texts(chat: _Chat) -> Iterator[str]:
    yield chat.title
    nodes = json.loads(chat.content).get("nodes")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        text = node.get("text") if isinstance(node, dict) else None
        if isinstance(text, str):
            yield text
