"""Signing in and out: by the issuer, or by a link of `lacre admin open`."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lacre import problems
from lacre_gateway.admin.api import Asking, guarded_router
from lacre_gateway.admin.reports import OpenLink
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.console.links import LIVES
from lacre_gateway.console.sessions import FLOW_LIVES, CookieTooLong
from lacre_gateway.console.sign_in import CALLBACK, SignIn, SignInFailed
from lacre_gateway.console.site import HOME, NOT_SIGNED_IN, SIGN_IN, STATIC, ConsoleSite, Visit, back_in
from lacre_gateway.http.headers import Fields
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.question import AdminAction

START = "/console/start"
OPEN = "/console/open"


def install(app: FastAPI, site: ConsoleSite) -> None:
    doors = Doors(site)
    site.open_page(app, SIGN_IN, doors.sign_in)
    site.open_page(app, START, doors.start)
    site.open_page(app, CALLBACK, doors.callback)
    site.open_page(app, OPEN, doors.offered)
    site.open_page(app, OPEN, doors.opened, "POST")
    site.change(app, "/console/sign-out", doors.sign_out, step_up=False)
    site.open_page(app, "/console", doors.home)
    for name in site.files:
        site.open_page(app, STATIC + name, doors.static)
    router = guarded_router()

    @router.post("/v1/console/links", status_code=201)
    async def link(request: Request, asking: Asking) -> OpenLink:
        """A link to the console for the caller, which works once and for a minute. `lacre admin open` shows it."""
        await asking.may(AdminAction.USAGE, "console")
        token = (Fields.collect(request.scope["headers"]).authorization() or b"").decode("ascii").split()[-1]
        code = site.links.make(token, _named(asking.who))
        if code is None:
            raise Refusal(problems.RATE_LIMITED, retry_after=LIVES, noted="console: too many links wait to be opened")
        return OpenLink(url=f"{site.console.url}{OPEN}?code={code}", seconds=LIVES)

    app.include_router(router)


class Doors:
    def __init__(self, site: ConsoleSite) -> None:
        self._site = site

    async def home(self, _request: Request) -> Response:
        return RedirectResponse(HOME, 308)

    async def static(self, request: Request) -> Response:
        found = self._site.file(request.url.path.removeprefix(STATIC))
        if found is None:
            raise Refusal(problems.NOT_FOUND)
        return found

    async def sign_in(self, request: Request) -> Response:
        """Says how to sign in. It does not begin by itself: a person whom no rule permits would go in a circle."""
        back = back_in(request.query_params.get("back", HOME))
        return self._site.render("sign_in.html", "Sign in", back=quote(back), out="out" in request.query_params)

    async def start(self, request: Request) -> Response:
        """Sends the browser to the issuer. again: the issuer must ask who it is."""
        way = self._way()
        again = "again" in request.query_params
        flow, cookie = self._site.sessions.begin_flow(back_in(request.query_params.get("back", HOME)), again=again)
        answer = RedirectResponse(await way.address(flow), 303)
        answer.headers.append("set-cookie", cookie)
        return answer

    async def callback(self, request: Request) -> Response:
        """The issuer's answer (RFC 6749 section 4.1.2)."""
        way, site, said = self._way(), self._site, request.query_params
        flow = site.sessions.take_flow(request.cookies, said.get("state", ""))
        if flow is None:
            raise Refusal(NOT_SIGNED_IN, noted="console: no sign-in of this browser has this state, or it was used")
        if "error" in said or "code" not in said:
            raise SignInFailed("the issuer answered with an error, and no code")
        found = await way.finish(flow, said["code"], said.get("iss"))
        # Whole seconds, on a clock that may differ.
        if flow.again and found.at < flow.until - FLOW_LIVES - way.leeway - 1:
            raise SignInFailed("the issuer did not ask again who it is")
        return await self._enter(request, found.token, flow.back, found.at + site.console.step_up)

    async def offered(self, request: Request) -> Response:
        """Shows for whom the link is. Only the form that it shows uses it up."""
        code = request.query_params.get("code", "")
        offer = self._site.links.look(code)
        if offer is None:
            raise Refusal(NOT_SIGNED_IN, noted="console: no such link, or it was used, or a minute is over")
        return self._site.render("open.html", "Open the console", who=offer.who, code=code)

    async def opened(self, request: Request) -> Response:
        site = self._site
        site.check_origin(request)
        offer = site.links.take((await site.form(request)).get("code", ""))
        if offer is None:
            raise Refusal(NOT_SIGNED_IN, noted="console: no such link, or it was used, or a minute is over")
        return await self._enter(request, offer.token, HOME, site.gateway.clock() + site.console.step_up)

    async def _enter(self, request: Request, token: str, back: str, fresh: float) -> Response:
        """A new session for this token. Ends the one that the browser had. Raises Refusal."""
        site = self._site
        examined = await site.gateway.authenticator.examine(f"Bearer {token}".encode())
        if examined.bound:
            raise SignInFailed("the access token is bound to a key: the console needs a bearer token")
        old = site.sessions.find(request.cookies)
        if old is not None:
            site.sessions.end(old)
        until = min(site.gateway.clock() + site.console.session, examined.expires_at)
        try:
            _, cookie = site.sessions.begin(token, until, fresh)
        except CookieTooLong as exc:
            raise SignInFailed(str(exc)) from exc
        answer = RedirectResponse(back, 303)
        answer.headers.append("set-cookie", cookie)
        answer.headers.append("set-cookie", site.sessions.forget_flow())
        return answer

    async def sign_out(self, visit: Visit) -> Response:
        answer = RedirectResponse(f"{SIGN_IN}?out", 303)
        answer.headers.append("set-cookie", self._site.sessions.end(visit.session))
        return answer

    def _way(self) -> SignIn:
        """Raises Refusal."""
        if self._site.sign_in is None:
            raise Refusal(problems.NOT_FOUND, noted="console: the settings name no issuer")
        return self._site.sign_in


def _named(who: Principal) -> str:
    return f"{who.subject} of {who.tenant}"
