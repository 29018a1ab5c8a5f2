"""Who gets into the chat page, by what it was sent; and what every answer forbids a browser."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from lacre.page import documents
from lacre.page.app import beside
from lacre.page.door import HALF, LINK_LIFE, MAX_LINKS, SESSION_LIFE, ClosedDoor, PageDoor
from lacre_backend.api.app import create_app
from parts.chat_page import API, ORIGIN, SCRIPT, Visitor, new_chat, page_of
from parts.echo_engine import EchoEngine
from parts.relay import Relay

HOST = "127.0.0.1:11435"
EVIL = "http://evil.example"
GETS = ("state", "chats", f"chats/{1:032x}")
CHANGES = (
    ("POST", "claim"), ("POST", "link"), ("POST", "ask"), ("POST", "render"), ("POST", "search"), ("POST", "history"),
    ("DELETE", "history"), ("PUT", f"chats/{1:032x}"), ("DELETE", f"chats/{1:032x}"),
)  # fmt: skip


@pytest.fixture
def relay() -> Relay:
    return Relay(create_app([EchoEngine(name="tiny")]))


@pytest.fixture
async def outside(relay: Relay, tmp_path: Path) -> AsyncIterator[Visitor]:
    async with page_of(relay, tmp_path) as visitor:
        yield visitor


@pytest.fixture
async def inside(outside: Visitor) -> Visitor:
    await outside.enter()
    return outside


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def key_of(link: str) -> str:
    return link.partition("?key=")[2]


class TestLink:
    def test_it_works_once(self) -> None:
        door = PageDoor(ORIGIN)
        link = door.link()
        assert link.startswith(f"{ORIGIN}/?key=") and len(key_of(link)) >= 43
        cookie = door.exchange(key_of(link))
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie and "Domain" not in cookie
        assert key_of(link) not in cookie and key_of(link) not in repr(door)
        with pytest.raises(ClosedDoor, match="used before") as again:
            door.exchange(key_of(link))
        assert (again.value.status, again.value.code) == (410, "link_used")

    @pytest.mark.parametrize("key", ["", "x", "é", "\udcff", "a" * 5000])
    def test_a_key_that_was_never_made(self, key: str) -> None:
        door = PageDoor(ORIGIN)
        door.link()
        with pytest.raises(ClosedDoor, match="did not make this link") as refused:
            door.exchange(key)
        assert refused.value.status == 403

    def test_its_life(self) -> None:
        clock = Clock()
        door = PageDoor(ORIGIN, clock=clock)
        early, late = door.link(), door.link()
        clock.now += LINK_LIFE
        door.exchange(key_of(early))
        clock.now += 1
        with pytest.raises(ClosedDoor, match="older than ten minutes"):
            door.exchange(key_of(late))
        with pytest.raises(ClosedDoor, match="used before"):
            door.exchange(key_of(late))

    def test_many_links(self) -> None:
        door = PageDoor(ORIGIN)
        links = [door.link() for _ in range(MAX_LINKS + 1)]
        with pytest.raises(ClosedDoor, match="did not make"):
            door.exchange(key_of(links[0]))
        assert [door.exchange(key_of(link)) for link in links[1:]]

    def test_a_session_ends(self) -> None:
        clock = Clock()
        door = PageDoor(ORIGIN, clock=clock)
        sent = Headers({"cookie": door.exchange(key_of(door.link())).partition(";")[0]})
        half = door.claim(sent)
        full = Headers({**sent, HALF: half})
        door.check_session(full)
        clock.now += SESSION_LIFE + 1
        with pytest.raises(ClosedDoor, match="has not opened"):
            door.check_session(full)

    async def test_the_key_leaves_the_address_at_once(self, outside: Visitor) -> None:
        key = key_of(outside.page.door.link())
        opened = await outside.http.get("/", params={"key": key}, headers={"sec-fetch-dest": "document"})
        assert (opened.status_code, opened.headers["location"], opened.content) == (303, "/", b"")
        assert opened.headers["referrer-policy"] == "no-referrer" and opened.headers["cache-control"] == "no-store"
        assert key not in str(opened.headers)
        used = await outside.http.get("/", params={"key": key})
        assert used.status_code == 410 and "used before" in used.text and key not in used.text
        assert "set-cookie" not in used.headers

    async def test_who_is_in_needs_no_link(self, inside: Visitor) -> None:
        """A reload of the first address does not lock a person out."""
        again = await inside.http.get("/", params={"key": "used"})
        assert (again.status_code, again.headers["location"]) == (303, "/")
        assert (await inside.http.get("/")).status_code == 200

    async def test_a_link_opened_by_who_is_in_works_for_nobody_else(self, inside: Visitor) -> None:
        key = key_of(inside.page.door.link())
        head = await inside.http.head("/", params={"key": key})
        assert head.status_code == 303
        entered: list[None] = []
        inside.page.door.entered = lambda: entered.append(None)
        for _ in range(2):
            opened = await inside.http.get("/", params={"key": key})
            assert (opened.status_code, opened.headers["location"]) == (303, "/") and "set-cookie" not in opened.headers
        assert len(entered) == 1
        with pytest.raises(ClosedDoor, match="used before"):
            inside.page.door.exchange(key)

    @pytest.mark.parametrize(
        "headers",
        [
            {"host": "evil.example"}, {"host": "localhost:11435"}, {"host": "127.0.0.1"}, {"host": "127.0.0.1:1"},
            {"sec-fetch-dest": "iframe"}, {"sec-fetch-dest": "image"}, {"sec-fetch-dest": "empty"}, {"origin": EVIL},
            {"origin": "null"}, {"sec-purpose": "prefetch"}, {"sec-purpose": "prefetch;prerender"}, {"purpose": "prefetch"},
        ],
        ids=str,
    )  # fmt: skip
    async def test_what_does_not_use_a_link_up(self, outside: Visitor, headers: dict[str, str]) -> None:
        key = key_of(outside.page.door.link())
        refused = await outside.http.get("/", params={"key": key}, headers=headers)
        assert refused.status_code in (403, 421) and "set-cookie" not in refused.headers
        head = await outside.http.head("/", params={"key": key})
        assert "set-cookie" not in head.headers
        assert "set-cookie" in (await outside.http.get("/", params={"key": key})).headers

    async def test_a_link_in_another_page(self, outside: Visitor) -> None:
        """A browser keeps the cookie back then. A page of ours leads to it once more, and no further."""
        bounced = await outside.http.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"})
        assert bounced.status_code == 200 and 'http-equiv="refresh" content="0;url=/"' in bounced.text
        closed = await outside.http.get("/", headers={"sec-fetch-site": "same-origin", "sec-fetch-dest": "document"})
        assert closed.status_code == 401 and "refresh" not in closed.text


class TestApi:
    async def test_with_everything(self, inside: Visitor) -> None:
        assert [(await inside.ask("GET", path)).status_code for path in GETS] == [200, 200, 404]
        assert (await inside.ask("PUT", f"chats/{1:032x}", new_chat())).json() == {"revision": 1}

    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"cookie": "lacre-page-11435=x"}, "no_session"),
            ({"cookie": ""}, "no_session"),
            ({HALF: "x"}, "no_half"),
            ({HALF: None}, "no_half"),
            *(({"host": host}, "host") for host in ("evil.example", "evil.example:11435", "localhost:11435", "[::1]:11435")),
            *(
                ({"origin": origin}, "origin")
                for origin in (EVIL, "null", "http://127.0.0.1:11436", "http://localhost:11435", "")
            ),
            *(({"sec_fetch_site": site}, "origin") for site in ("cross-site", "same-site", "")),
        ],
        ids=str,
    )
    async def test_with_one_thing_wrong(self, inside: Visitor, relay: Relay, headers: dict[str, Any], code: str) -> None:
        for method, path in (*(("GET", path) for path in GETS), *CHANGES):
            if path == "claim" and HALF in headers:
                continue  # a claim has no half yet
            told = await inside.ask(method, path, {} if method != "GET" else None, **headers)
            expected = {"host": 421, "origin": 403}.get(code, 401)
            assert (told.status_code, told.json()["error"]["code"]) == (expected, code), (method, path)
            assert "access-control-allow-origin" not in told.headers
        assert not relay.sealed

    async def test_a_change_needs_an_origin(self, inside: Visitor) -> None:
        for method, path in CHANGES:
            told = await inside.ask(method, path, {}, origin=None)
            assert (told.status_code, told.json()["error"]["code"]) == (403, "origin"), path

    async def test_a_half_leaves_once(self, inside: Visitor) -> None:
        """A thief of the cookie, such as a server on another port, gets no half of its own."""
        told = await inside.http.post(f"{API}claim", headers=SCRIPT, json={})
        assert (told.status_code, told.json()["error"]["code"]) == (409, "claimed")

    async def test_two_sessions(self, inside: Visitor) -> None:
        """One's half is no good with the other's cookie."""
        half, cookie = inside.half, inside.http.headers["cookie"]
        del inside.http.headers["cookie"]
        await inside.enter()
        assert (await inside.ask("GET", "chats", **{HALF: half})).status_code == 401
        inside.http.headers["cookie"] = f"{cookie}; {inside.http.headers['cookie']}".replace("; ", " ;  ")
        assert (await inside.ask("GET", "chats", **{HALF: half})).status_code == 200

    async def test_a_preflight(self, inside: Visitor) -> None:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": HALF}
        told = await inside.ask("OPTIONS", "ask", origin=EVIL, **asked)
        assert told.status_code == 405 and not [name for name in told.headers if name.startswith("access-control")]

    async def test_a_body_that_a_form_can_send(self, inside: Visitor) -> None:
        sent = {**SCRIPT, HALF: inside.half, "content-type": "text/plain"}
        told = await inside.http.post(f"{API}search", headers=sent, content=b'{"words": "x"}')
        assert (told.status_code, told.json()["error"]["code"]) == (415, "media_type")

    async def test_a_body_that_is_too_long(self, inside: Visitor) -> None:
        told = await inside.ask("POST", "search", {"words": "x" * 20_000})
        assert (told.status_code, told.json()["error"]["code"]) == (413, "message_too_large")


class TestHeaders:
    @pytest.mark.parametrize("entered", [False, True])
    async def test_of_every_answer(self, outside: Visitor, entered: bool) -> None:
        if entered:
            await outside.enter()
        files = ("main.js", "base.css", "seal.svg", "nothing.js", "shell.html")
        own = [f"{API}state", f"{API}nothing", *(f"/page/{name}" for name in files)]
        for path in ("/", "/?key=x", "/nothing", "/page/../door.py", *own):
            told = await outside.http.get(path)
            policy = dict(part.split(" ", 1) for part in told.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == f"{ORIGIN}/page/"
            assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
            assert "unsafe" not in str(policy) and "*" not in str(policy)
            wanted = {
                "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
                "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
                "cache-control": "no-store",
            }  # fmt: skip
            assert {name: told.headers.get(name) for name in wanted} == wanted

    async def test_files(self, outside: Visitor) -> None:
        names = documents.loaded()
        assert "shell.html" not in names
        for name, (content, kind) in names.items():
            told = await outside.http.get(f"/page/{name}", headers={"sec-fetch-site": "same-origin"})
            assert (told.status_code, told.content, told.headers["content-type"]) == (200, content, kind)
        foreign = await outside.http.get("/page/main.js", headers={"sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403

    def test_nothing_is_inline_or_from_elsewhere(self) -> None:
        shell = documents.shell().decode()
        assert "<style" not in shell and "onload" not in shell and "style=" not in shell and "<script>" not in shell
        sources = {name: content.decode() for name, (content, _) in documents.loaded().items()}
        for name, source in {**sources, "shell.html": shell}.items():
            found = [
                word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in source
            ]
            assert not found, name
            assert [piece for piece in source.split('"') if "://" in piece and "w3.org" not in piece] == [], name

    def test_a_notice_escapes(self) -> None:
        made = documents.notice("<b>", "a `<script>` & more").decode()
        assert "<b>" not in made and "<code>&lt;script&gt;</code> &amp; more" in made


async def test_beside_the_api() -> None:
    """The proxy's API keeps its own rules, and the page never sees its paths."""
    seen: list[tuple[str, str]] = []

    def app(name: str) -> Any:
        async def taken(scope: Any, _receive: Any, _send: Any) -> None:
            seen.append((name, scope["path"]))

        return taken

    both = beside(app("api"), app("page"))
    for path in ("/v1/chat/completions", "/infill", "/", "/page/api/ask", "/v1", "/v1x", "/infill/x"):
        await both({"type": "http", "path": path}, None, None)  # type: ignore[arg-type]
    assert [name for name, _ in seen] == ["api", "api", *["page"] * 5]


@pytest.mark.parametrize("value", [f"{HOST}, {HOST}", HOST.upper() + ".", f"{HOST}/", f"user@{HOST}"])
def test_a_host_in_another_spelling(value: str) -> None:
    with pytest.raises(ClosedDoor):
        PageDoor(ORIGIN).check_host(Headers({"host": value}))
