"""How a page of the console is asked for and answered; the pages themselves are in `pages.py`.

Rules:
- The `Host` is the one of `console.url`, so no other name of this machine reaches a session.
- A GET changes nothing. A change is a POST of this origin, with the session's own CSRF token, soon after the person proved to
  be there.
- The caller is known before a form is read. It is judged by its access token, as a call of the admin API is.
- Every answer has the same strict headers: no script or style but ours, no frame, no cache, no address for other sites.
- A page has words of ours, and names and numbers, each escaped. An error shows its row of the problem table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from lacre import __version__, problems
from lacre.errors import InvalidMessage, LacreError, UsageError
from lacre.problems import Problem
from lacre_gateway.admin.api import AdminCaller, body_of, charged, identified
from lacre_gateway.auth.fetch import FetchFailed
from lacre_gateway.console import words
from lacre_gateway.console.links import OpenLinks
from lacre_gateway.console.sessions import Session, Sessions
from lacre_gateway.console.sign_in import SignIn, SignInFailed
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.answers import INVALID, problem_response
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.question import AdminAction, AdminQuestion
from lacre_gateway.relay.failures import refusal_for
from lacre_gateway.settings import Console

HERE: Final = Path(__file__).parent
HOME: Final = "/console/"
SIGN_IN: Final = "/console/sign-in"
STATIC: Final = "/console/static/"
MAX_FIELDS: Final = 64  # of a form; ours have a dozen
WRONG_HOST: Final = Problem(
    "urn:lacre:problem:console-host", 421, "The console is not served under this name",
    "Open the address that `console.url` of the gateway's settings names.")  # fmt: skip
CROSS_SITE: Final = Problem(
    "urn:lacre:problem:console-form", 403, "This form did not come from this session of the console",
    "Open the page again, and send its form once more.")  # fmt: skip
NOT_FRESH: Final = Problem(
    "urn:lacre:problem:console-step-up", 403, "A change needs a fresh sign-in",
    "Confirm that it is you, then send the form again.")  # fmt: skip
NOT_SIGNED_IN: Final = Problem(
    "urn:lacre:problem:console-sign-in", 403, "The sign-in did not succeed",
    "Sign in again. If it fails again, look in the gateway's log for this request.")  # fmt: skip
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: browsers would then send `Origin: null` with our own forms (Fetch, section 3.1).
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-store",
}
_TYPES: Final = {".css": "text/css; charset=utf-8", ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_BACK: Final = re.compile(r"/console/[a-z-]{0,32}(?:\?[A-Za-z0-9=&%._:+~-]{0,512})?")
# Each page of the menu, its name, and the action that it needs; None: everyone who is signed in.
MENU: Final[tuple[tuple[str, str, AdminAction | None], ...]] = (
    (HOME, "Overview", AdminAction.USAGE),
    ("/console/tenants", "Tenants", AdminAction.USAGE),
    ("/console/requests", "Requests", AdminAction.AUDIT),
    ("/console/policy", "Policy", AdminAction.AUDIT),
    ("/console/keys", "Keys", AdminAction.USAGE),
    ("/console/workers", "Workers", AdminAction.USAGE),
    ("/console/audit", "Audit", AdminAction.AUDIT),
    ("/console/me", "Me", None),
)

# What a change did, for the page after it: fixed words, so that an address can put none of its own there.
DONE: Final[Mapping[str, str]] = {
    "draining": "This gateway drains: it is no longer ready, and ends when its streams have finished.",
    "worker-drained": "The worker takes no more work. Its streams finish, and it stays until its process ends.",
    "worker-resumed": "The worker takes work again.",
    "reloaded": "The rules on the disk are in force.",
    "refused": "The rules or the settings on the disk do not hold: the last good ones stay in force.",
    "topped-up": "The limit is raised until its window ends, at all gateways.",
    "reset": "The used amount is given back in this window, at all gateways.",
    "revoked": "All tokens that this subject was issued until now are revoked, at all gateways.",
}


@dataclass(slots=True)
class Visit:
    """A request of a person who is signed in. form: of a POST. menu: the page that the menu marks."""

    site: ConsoleSite
    request: Request
    session: Session
    asking: AdminCaller
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def gateway(self) -> Gateway:
        return self.asking.gateway

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    @property
    def fresh(self) -> bool:
        return self.session.fresh > self.gateway.clock()

    def show(self, template: str, title: str, status: int = 200, **facts: Any) -> Response:
        return self.site.render(template, title, status, visit=self, **facts)


Shown = Callable[[Visit], Awaitable[Response]]


class ConsoleSite:
    """The console of one gateway. Raises SettingsError."""

    def __init__(self, gateway: Gateway, console: Console) -> None:
        self.gateway = gateway
        self.console = console
        self.sessions = Sessions(secure=console.secure, instance=gateway.settings.instance, clock=gateway.clock)
        self.links = OpenLinks(gateway.clock)
        self.sign_in = None if console.issuer is None else SignIn(gateway, console)
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, auto_reload=False,
        )  # fmt: skip
        self._templates.filters.update(words.FILTERS)
        self._static = {path.name: path.read_bytes() for path in (HERE / "static").iterdir() if path.suffix in _TYPES}
        # In the addresses of our files, so that a browser never mixes those of two versions.
        self.assets = hashlib.sha256(b"".join(self._static[name] for name in sorted(self._static))).hexdigest()[:12]

    # Routes

    def page(self, app: FastAPI, path: str, shown: Shown) -> None:
        """A page that changes nothing."""
        self._add(app, path, ["GET", "HEAD"], partial(self._visited, shown=shown))

    def change(self, app: FastAPI, path: str, shown: Shown, *, step_up: bool = True) -> None:
        """A form of a page. step_up: whether it needs a fresh sign-in."""
        self._add(app, path, ["POST"], partial(self._changed, shown=shown, step_up=step_up))

    def open_page(self, app: FastAPI, path: str, shown: Callable[[Request], Awaitable[Response]], method: str = "GET") -> None:
        """For those who are not signed in."""
        self._add(app, path, [method], shown)

    def _add(self, app: FastAPI, path: str, methods: Sequence[str], shown: Callable[[Request], Awaitable[Response]]) -> None:
        app.router.routes.append(Route(path, partial(self._answered, shown=shown), methods=[*methods]))

    async def _answered(self, request: Request, shown: Callable[[Request], Awaitable[Response]]) -> Response:
        await request.app.state.limit.check(request)
        try:
            if request.headers.getlist("host") != [self.console.host]:
                raise Refusal(WRONG_HOST, noted="another Host than console.url")
            answer = await shown(request)
        except (Refusal, LacreError, ValidationError) as exc:
            answer = self._refused(request, exc)
        for name, value in _HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    async def _visited(self, request: Request, shown: Shown) -> Response:
        session = self.sessions.find(request.cookies)
        if session is None:
            return RedirectResponse(f"{SIGN_IN}?back={quote(self._here(request))}", 303)
        try:
            asking = await self._asking(request, session)
        except Refusal as exc:
            if exc.problem.status != 401:
                raise
            answer = RedirectResponse(f"{SIGN_IN}?back={quote(self._here(request))}", 303)
            answer.headers.append("set-cookie", self.sessions.forget())
            return answer
        with charged(asking):
            return await shown(Visit(self, request, session, asking))

    async def _changed(self, request: Request, shown: Shown, *, step_up: bool) -> Response:
        self.check_origin(request)
        session = self.sessions.find(request.cookies)
        if session is None:
            raise Refusal(problems.INVALID_TOKEN, noted="console: no session")
        asking = await self._asking(request, session)
        with charged(asking):
            form = await self.form(request)
            if not compare_digest(form.get("csrf", "").encode(), self.sessions.csrf(session).encode()):
                raise Refusal(CROSS_SITE, noted="console: not this session's CSRF token")
            if step_up and session.fresh <= self.gateway.clock():
                raise Refusal(NOT_FRESH, noted="console: a change needs a fresh sign-in")
            return await shown(Visit(self, request, session, asking, form))

    async def _asking(self, request: Request, session: Session) -> AdminCaller:
        """Raises Refusal."""
        return await identified(request, f"Bearer {session.token}".encode())

    def check_origin(self, request: Request) -> None:
        """Raises Refusal unless a page of this console sent the form."""
        same = request.headers.get("sec-fetch-site", "same-origin") == "same-origin"
        if not same or request.headers.getlist("origin") != [self.console.url]:
            raise Refusal(CROSS_SITE, noted="console: a form of another origin")

    async def form(self, request: Request) -> dict[str, str]:
        """Raises Refusal."""
        body = await body_of(request, self.gateway.settings.limits.body_timeout)
        media = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=MAX_FIELDS)
        except ValueError as exc:  # UnicodeDecodeError is one
            raise Refusal(INVALID, noted="console: not a form") from exc
        found = dict(pairs)
        if media != "application/x-www-form-urlencoded" or len(found) != len(pairs):
            raise Refusal(INVALID, noted="console: not a form, or a field twice")
        return found

    def _here(self, request: Request) -> str:
        query = request.url.query
        return back_in(request.url.path + (f"?{query}" if query else ""))

    # Answers

    def render(self, template: str, title: str, status: int = 200, *, visit: Visit | None = None, **facts: Any) -> Response:
        gateway = self.gateway
        shown = self._templates.get_template(template).render(
            title=title,
            visit=visit,
            gateway=gateway.settings.instance,
            version=__version__,
            assets=self.assets,
            menu=[] if visit is None else self._menu(visit),
            csrf="" if visit is None else self.sessions.csrf(visit.session),
            now=gateway.clock(),
            done=None if visit is None else DONE.get(visit.query.get("done", "")),
            issuer=None if self.sign_in is None else self.sign_in.issuer,
            **facts,
        )
        return HTMLResponse(shown, status)

    def _menu(self, visit: Visit) -> list[tuple[str, str, bool]]:
        """The pages that this person may see; whether it is this one. The decision is neither remembered nor recorded."""
        here = visit.request.url.path
        return [
            (path, name, path == here or (path != HOME and here.startswith(path.removesuffix("s"))))
            for path, name, action in MENU
            if action is None or self.may(visit, action)
        ]

    def may(self, visit: Visit, action: AdminAction) -> bool:
        """Whether rules would permit it, to show or leave out a part of a page. It permits nothing by itself."""
        asking, gateway = visit.asking, self.gateway
        question = AdminQuestion(asking.who, action, gateway.settings.gateway, asking.address, round(gateway.clock(), 3))
        return gateway.rules.would_allow(question)

    def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, Refusal):
            refusal = error
        elif isinstance(error, SignInFailed | FetchFailed):
            refusal = Refusal(NOT_SIGNED_IN, noted=f"console: {error}")
        elif isinstance(error, ValidationError):
            refusal = Refusal(
                INVALID, noted="; ".join(f"{'.'.join(map(str, e['loc']))}: {e['type']}" for e in error.errors()[:4])
            )
        elif isinstance(error, UsageError | InvalidMessage):
            refusal = Refusal(INVALID, noted=str(error))
        else:
            refusal = refusal_for(error)
        plain = problem_response(request, refusal)  # which also tells the access log
        session = self.sessions.find(request.cookies)
        again = refusal.problem is NOT_FRESH or refusal.problem.status == 401 or session is None
        answer = self.render(
            "error.html", refusal.problem.title, plain.status_code, problem=refusal.problem, again=again,
            request_id=request.scope.get("state", {}).get("request_id"), host=self.console.url,
            action=refusal.facts.get("action"), noted=refusal.noted if refusal.problem is INVALID else "",
        )  # fmt: skip
        if (later := plain.headers.get("retry-after")) is not None:
            answer.headers["retry-after"] = later
        return answer

    def file(self, name: str) -> Response | None:
        """One of our own files; None if there is no such one."""
        content = self._static.get(name)
        if content is None:
            return None
        headers = {"content-type": _TYPES[name[name.rindex(".") :]], "cache-control": "public, max-age=31536000, immutable"}
        return Response(content, headers=headers)

    @property
    def files(self) -> Sequence[str]:
        return sorted(self._static)


def back_in(address: str) -> str:
    """The page to return to: one of ours, never another site's."""
    return address if _BACK.fullmatch(address) else HOME
