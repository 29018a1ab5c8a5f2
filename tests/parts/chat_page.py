"""The chat page in one process with a relay: its app, a browser's headers, and a session that is in."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from lacre.page.app import Page, create_page
from lacre.page.chats import Chats
from lacre.page.door import HALF, PageDoor
from lacre.page.history import ChatHistory
from lacre.transport.dial import NoCookies
from parts.relay import Relay, connect_async

ORIGIN = "http://127.0.0.1:11435"
API = "/page/api/"
SCRYPT_N = 2**4  # no test guesses passphrases
# What Chromium sends with a request of the page's own script.
SCRIPT = {"origin": ORIGIN, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}


def new_chat(number: int = 1, text: str = "the sea", **members: Any) -> dict[str, Any]:
    """A chat as the page keeps it."""
    node = {"id": f"{number + 1000:032x}", "parent": "", "role": "user", "text": text, "at": 1.0, "files": []}
    chat = {"id": f"{number:032x}", "title": f"Chat {number}", "updated": float(number), "nodes": {node["id"]: node}}
    return chat | members


@dataclass
class Visitor:
    """A browser at the page. half: the session's, once claimed."""

    http: httpx2.AsyncClient
    page: Page
    half: str = ""

    async def enter(self) -> None:
        key = self.page.door.link().partition("?key=")[2]
        opened = await self.http.get("/", params={"key": key})
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        cookie = re.match(r"[^;]+", opened.headers["set-cookie"])
        assert cookie
        self.http.headers["cookie"] = cookie[0]
        self.half = (await self.http.post(f"{API}claim", headers=SCRIPT, json={})).json()["half"]

    async def ask(self, method: str, path: str, body: Any = None, **headers: str | None) -> httpx2.Response:
        """As the page's script asks. headers: over its own; None for one that is not sent. `_` stands for `-`."""
        over = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {name: value for name, value in ({**SCRIPT, HALF: self.half} | over).items() if value is not None}
        return await self.http.request(method, API + path, headers=sent, **({} if body is None else {"json": body}))

    async def answer(self, question: str, **members: Any) -> list[dict[str, Any]]:
        """The lines of an answer."""
        told = await self.ask("POST", "ask", {"messages": [{"role": "user", "content": question}], **members})
        return [json.loads(line) for line in told.text.splitlines()]


@asynccontextmanager
async def page_of(relay: Relay, folder: Path, history: ChatHistory | None = None, **options: Any) -> AsyncIterator[Visitor]:
    """A visitor that is not in yet. options: of the client."""
    kept = ChatHistory(folder / "chats", None, SCRYPT_N) if history is None else history
    async with connect_async(relay, **options) as client:
        page = Page(client, PageDoor(ORIGIN), Chats(kept))
        wire = httpx2.ASGITransport(create_page(page))
        async with httpx2.AsyncClient(transport=wire, base_url=ORIGIN, cookies=NoCookies()) as http:
            yield Visitor(http, page)
