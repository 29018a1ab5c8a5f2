"""A person at the operators' console, without a screen: it keeps cookies and sends the forms that it sees.

It is rude on purpose where a test asks: other origins, hosts and tokens.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import urlsplit

import httpx2
from fastapi import FastAPI

from lacre_gateway.console.console import OperatorsConsole
from parts.in_memory_http import InMemoryHttp
from parts.stage import Stage

URL = "http://127.0.0.1:8322"
SETTINGS = f'admin.port = 8322\nconsole.url = "{URL}"\n'


class Clock:
    """Seconds since the epoch, which a test moves on."""

    def __init__(self, now: Any) -> None:
        self._now = now
        self.ahead = 0.0

    def __call__(self) -> float:
        return float(self._now() + self.ahead)


class Desk:
    """A stage whose admin app has the console. It ends with the stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.clock = Clock(stage.gateway.clock)
        stage.gateway.clock = self.clock
        self.console = OperatorsConsole(stage.gateway)
        stage.stack.push_async_callback(self.console.close)
        self.console.extend(stage.admin)

    def person(self, app: FastAPI | None = None) -> Person:
        return Person(self, app or self.stage.admin)

    def admin(self, scope: str = "lacre:admin", **claims: Any) -> str:
        return self.stage.issuer.token(**{"scope": scope, "sub": "root", **claims})

    async def signed_in(self, token: str | None = None) -> Person:
        person = self.person()
        await person.open(token or self.admin())
        return person


class Person:
    def __init__(self, desk: Desk, app: FastAPI) -> None:
        self.desk = desk
        self.http = httpx2.AsyncClient(transport=InMemoryHttp(app, "127.0.0.1"), base_url=URL)

    @property
    def session(self) -> str:
        """The cookie; empty if there is none."""
        return self.http.cookies.get(self.desk.console.site.sessions.name) or ""

    @session.setter
    def session(self, value: str) -> None:
        self.http.cookies.clear()
        self.http.cookies.set(self.desk.console.site.sessions.name, value, domain="127.0.0.1", path="/")

    async def link(self, token: str) -> str:
        """As `lacre admin open` asks for it; the part of the address after the host."""
        made = await self.http.post("/v1/console/links", headers={"authorization": f"Bearer {token}"})
        assert made.status_code == 201, made.text
        parts = urlsplit(made.json()["url"])
        return f"{parts.path}?{parts.query}"

    async def open(self, token: str) -> httpx2.Response:
        """Signs in by a link."""
        link = await self.link(token)
        assert (await self.http.get(link)).status_code == 200
        entered = await self.http.post("/console/open", data={"code": link.partition("code=")[2]}, headers={"origin": URL})
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/"), entered.text
        return entered

    async def get(self, path: str, **options: Any) -> httpx2.Response:
        """A page. The index has all of the log by then: a page itself waits for it only a moment, on any machine."""
        await asyncio.to_thread(self.desk.console.index.catch_up)
        return await self.http.get(path, **options)

    async def csrf(self) -> str:
        """Of this session, as a page carries it."""
        found = re.search('name="csrf" value="([^"]+)"', (await self.get("/console/me")).text)
        assert found is not None
        return found[1]

    async def send(self, path: str, *, origin: str = URL, csrf: str | None = None, **fields: str) -> httpx2.Response:
        """A form; fields: beside its token."""
        token = await self.csrf() if csrf is None else csrf
        headers = {"origin": origin} if origin else {}
        return await self.http.post(path, data={"csrf": token, **fields}, headers=headers)
