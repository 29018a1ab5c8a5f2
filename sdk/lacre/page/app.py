"""The chat page as an ASGI app. `lacre proxy --open` serves it beside its API.

Rules:
- Each request passes the door first: the address, the origin, and for the API the session. Only then is a body read.
- Every answer has the headers of `documents.guarded`, refusals too.
- An error is `{"error": {…}}` with what happened and what helps. A person who opens a document gets it as a page.
- Nothing of a request or an answer is logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lacre._version import __version__
from lacre.client import AsyncClient
from lacre.errors import LacreError, MessageTooLarge, UsageError
from lacre.exchange.refusal_shapes import explained, status_of
from lacre.exchange.request import MAX_CONTENT
from lacre.page import answers, documents
from lacre.page.chats import Chats, StaleChat
from lacre.page.door import ClosedDoor, PageDoor
from lacre.page.history import MAX_CHAT
from lacre.page.markdown import blocks
from lacre.runtime.json_objects import parse_object

API: Final = "/page/api/"
BODY_TIMEOUT: Final = 60.0  # seconds for a body; it comes from this machine
MAX_SMALL: Final = 16 * 1024  # bytes of a body that holds no text of a chat
MAX_RENDERED: Final = 200  # texts in one request
HELD: Final = 64 * 1024 * 1024  # bytes of all bodies that are being read
_MAX_DIGITS: Final = 15  # of a revision

Handler = Callable[["Page", Request], Awaitable[Response]]


@dataclass(slots=True)
class Page:
    """What the routes work on. priced: whether answers have a cost. pinned: digests of models that the client insists on."""

    client: AsyncClient
    door: PageDoor
    chats: Chats
    priced: bool = False
    pinned: Mapping[str, str] = field(default_factory=dict)
    guards: dict[str, str] = field(init=False)
    held: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.guards = documents.guarded(self.door.origin)


def create_page(page: Page) -> ASGIApp:
    """The app. The caller closes the client."""
    static = documents.loaded()

    async def document(request: Request) -> Response:
        return await _document(page, request)

    async def file(request: Request) -> Response:
        page.door.check_origin(request.headers, request.method)
        found = static.get(request.path_params["name"])
        if found is None:
            raise ClosedDoor(404, "unknown_file", "The chat page has no such file.")
        return Response(found[0], headers={**page.guards, "content-type": found[1]})

    def api(handler: Handler, *, claimed: bool = True) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            page.door.check_origin(request.headers, request.method)
            if claimed:
                page.door.check_session(request.headers)
            return await handler(page, request)

        return checked

    routes = [
        Route("/", document, methods=["GET"]),
        Route("/page/{name}", file, methods=["GET"]),
        Route(f"{API}claim", api(_claim, claimed=False), methods=["POST"]),
        Route(f"{API}state", api(_state), methods=["GET"]),
        Route(f"{API}link", api(_link), methods=["POST"]),
        Route(f"{API}ask", api(_ask), methods=["POST"]),
        Route(f"{API}render", api(_render), methods=["POST"]),
        Route(f"{API}chats", api(_heads), methods=["GET"]),
        Route(f"{API}search", api(_search), methods=["POST"]),
        Route(f"{API}chats/{{name}}", api(_chat), methods=["GET", "PUT", "DELETE"]),
        Route(f"{API}history", api(_history), methods=["POST", "DELETE"]),
    ]

    async def refused(request: Request, exc: Exception) -> Response:
        return _refusal(page, request, exc)

    kinds: list[Any] = [404, 405, ClosedDoor, LacreError, StaleChat, ClientDisconnect]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, refused))
    app.router.redirect_slashes = False
    return app


def beside(api: ASGIApp, page: ASGIApp) -> ASGIApp:
    """Both apps on one port. api: has `/v1` and `/infill`, with rules of its own for who may call."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        await (api if path.startswith("/v1/") or path == "/infill" else page)(scope, receive, send)

    return app


async def _document(page: Page, request: Request) -> Response:
    page.door.check_opening(request.headers)
    key = request.query_params.get("key")
    if key is not None and request.method == "GET" and not page.door.knows(request.headers):
        cookie = page.door.exchange(key)
        return Response(status_code=303, headers={**page.guards, "location": "/", "set-cookie": cookie})
    if key is not None:
        if request.method == "GET" and page.door.spend(key) is not None:  # so that another browser cannot use it
            page.door.entered()
        return Response(status_code=303, headers={**page.guards, "location": "/"})
    if page.door.knows(request.headers):
        return Response(documents.shell(), headers=page.guards, media_type="text/html")
    if request.headers.get("sec-fetch-site") == "cross-site":
        # A browser keeps the cookie back if another page led here. From this page it sends it.
        return Response(documents.notice("One moment", "", again=True), headers=page.guards, media_type="text/html")
    raise ClosedDoor(
        401, "no_session", "This browser has not opened the page's link. Use the link that `lacre proxy --open` prints."
    )


async def _claim(page: Page, request: Request) -> Response:
    return _told(page, {"half": page.door.claim(request.headers)})


async def _state(page: Page, _request: Request) -> Response:
    """What the page shows before the first question. A gateway that is away is part of it, and no failure."""
    models: tuple[str, ...] = ()
    error = None
    try:
        models = await page.client.models()
    except LacreError as exc:
        error = explained(exc)["error"]
    told = {
        "models": models, "error": error, "verification": page.client.verification.members(), "version": __version__,
        "priced": page.priced, "pinned": dict(page.pinned), "history": _history_state(page),
        "limits": {"chat": MAX_CHAT, "question": MAX_CONTENT},
    }  # fmt: skip
    return _told(page, told)


async def _link(page: Page, _request: Request) -> Response:
    return _told(page, {"link": page.door.link()})


async def _ask(page: Page, request: Request) -> Response:
    stream = answers.asked(page.client, await _sent(page, request, MAX_CONTENT))
    headers = {**page.guards, "x-accel-buffering": "no"}
    return StreamingResponse(answers.told(stream), headers=headers, media_type="application/x-ndjson")


async def _render(page: Page, request: Request) -> Response:
    texts = (await _sent(page, request, MAX_CHAT)).get("texts")
    if not isinstance(texts, list) or len(texts) > MAX_RENDERED or not all(map(_renderable, texts)):
        raise UsageError(f"up to {MAX_RENDERED} texts can be rendered at once, each with the places of its seams")
    return _told(page, {"rendered": [await asyncio.to_thread(blocks, each["text"], each["seams"]) for each in texts]})


def _renderable(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not isinstance(value.get("seams"), list):
        return False
    return all(isinstance(seam, int) and not isinstance(seam, bool) for seam in value["seams"])


async def _heads(page: Page, _request: Request) -> Response:
    return _told(page, {"chats": page.chats.heads(), "history": _history_state(page)})


async def _search(page: Page, request: Request) -> Response:
    words = (await _sent(page, request, MAX_SMALL)).get("words")
    return _told(page, {"chats": await asyncio.to_thread(page.chats.find, words) if isinstance(words, str) else []})


async def _chat(page: Page, request: Request) -> Response:
    name = request.path_params["name"]
    if request.method == "GET":
        content = page.chats.read(name)
        if content is None:
            raise ClosedDoor(404, "unknown_chat", "This chat was deleted, or its proxy has ended.")
        return Response(content, headers=page.guards, media_type="application/json")
    if request.method == "DELETE":
        async with page.changing:
            return _told(page, {"deleted": await asyncio.to_thread(page.chats.delete, name)})
    told = request.headers.get("lacre-revision", "")
    content = await _body(page, request, MAX_CHAT)
    async with page.changing:
        revision = await asyncio.to_thread(page.chats.write, name, content, _revision(told))
    return _told(page, {"revision": revision})


def _revision(told: str) -> int:
    """0: a new chat. Python refuses to read very long numbers."""
    return int(told) if told.isdecimal() and len(told) <= _MAX_DIGITS else 0


async def _history(page: Page, request: Request) -> Response:
    """Turns it on, opens it, or deletes all of it."""
    if request.method == "DELETE":
        async with page.changing:
            await asyncio.to_thread(page.chats.forget)
        return _told(page, _history_state(page))
    sent = await _sent(page, request, MAX_SMALL)
    kind, passphrase = sent.get("kind"), sent.get("passphrase", "")
    if kind not in ("keyring", "passphrase", "open") or not isinstance(passphrase, str):
        raise UsageError("a history is opened, or turned on with the keyring or with a passphrase")
    async with page.changing:
        history = page.chats.history
        if kind == "open":
            await asyncio.to_thread(history.open, passphrase)
        else:
            await asyncio.to_thread(history.turn_on, kind, passphrase)
        await asyncio.to_thread(page.chats.keep)
    return _told(page, _history_state(page))


def _history_state(page: Page) -> dict[str, Any]:
    history = page.chats.history
    wrong = [{"name": each.name, "reason": each.reason} for each in page.chats.unreadable]
    return {
        "state": history.state,
        "kind": history.kind,
        "keyring": history.has_keyring,
        "folder": str(history.folder),
        "unreadable": wrong,
    }


async def _sent(page: Page, request: Request, most: int) -> dict[str, Any]:
    return parse_object(await _body(page, request, most), "the request's body")


async def _body(page: Page, request: Request, most: int) -> bytes:
    """The body. Raises MessageTooLarge before it is buffered, and ClosedDoor."""
    if request.headers.get("content-type") != "application/json":
        raise ClosedDoor(415, "media_type", "The chat page sends JSON.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise MessageTooLarge(f"this may hold {most} bytes: attach smaller files, or begin a new chat")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for piece in request.stream():
                if len(content) + len(piece) > most:
                    raise MessageTooLarge(f"this may hold {most} bytes: attach smaller files, or begin a new chat")
                if page.held + len(piece) > HELD:
                    raise ClosedDoor(503, "overloaded", "Other requests of the page leave no room for this one: try it again.")
                page.held += len(piece)
                content += piece
    except TimeoutError:
        raise ClosedDoor(408, "slow_body", "The request's body did not arrive in time: try it again.") from None
    finally:
        page.held -= len(content)
    return bytes(content)


def _told(page: Page, members: Mapping[str, Any]) -> Response:
    return JSONResponse(members, headers=page.guards)


def _refusal(page: Page, request: Request, exc: Exception) -> Response:
    if isinstance(exc, LacreError) and not isinstance(exc, ClosedDoor):
        return JSONResponse({"error": explained(exc)["error"]}, status_of(exc), page.guards)
    status, code, text = 404, "unknown_path", "The chat page has no such address."
    if isinstance(exc, ClosedDoor):
        status, code, text = exc.status, exc.code, str(exc)
    elif isinstance(exc, StaleChat):
        status, code, text = 409, "stale", "Another window has changed this chat."
    elif isinstance(exc, ClientDisconnect):
        status, code, text = 499, "gone", ""
    elif getattr(exc, "status_code", 404) == 405:
        status, code, text = 405, "method", "The chat page does not take this method here."
    if request.url.path.startswith(API):
        told = {"message": text, "remedy": "", "code": code, "type": "lacre_page", "request_id": None, "verification": None}
        return JSONResponse({"error": told}, status, page.guards)
    return Response(documents.notice(_TITLES.get(status, "This page is closed"), text), status, page.guards, "text/html")


_TITLES: Final = {404: "Nothing is here", 410: "This link no longer works", 421: "Another address"}
