"""The routes of a gateway, as an app made by a factory. All state is in the `Gateway` that it gets.

There are no documentation routes, no redirects and no pages: any other path gets a problem document.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route

from lacre import problems
from lacre.jose.dpop import plain_url
from lacre.wire.header import SEALED_PATH
from lacre_fabric.work.contract import FabricError
from lacre_gateway.budget.holds import BudgetRefused
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.access_log import FACTS, KNOWN, AccessLog, RequestLog
from lacre_gateway.http.address_limit import AddressLimit
from lacre_gateway.http.answers import answer_with_problems, described
from lacre_gateway.http.clock import Clock
from lacre_gateway.http.connection import SealedRoute
from lacre_gateway.http.headers import Fields, address_of
from lacre_gateway.http.pages import AllowedPages, Preflights
from lacre_gateway.http.public_api import PATHS, SECURITY
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.relay.failures import refusal_for
from lacre_gateway.relay.pools import etag, require
from lacre_gateway.relay.relay import SealedEndpoint

_READ: Final = ["GET", "HEAD"]
OWN_USAGE_PATH: Final = "/v1/me/usage"


class GatewayApp(FastAPI):
    """sealed: serves the sealed requests. The listener passes them to it and not through ASGI, whose layers would cost each of
    them more than the decision about it (docs/gateway-performance.md).
    """

    sealed: SealedRoute


def create_app(gateway: Gateway) -> GatewayApp:
    """An app that serves from `gateway`; it neither starts nor stops any of its parts."""
    app = GatewayApp(title="Lacre gateway", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    log = RequestLog(gateway.log, gateway.lines)
    pages = AllowedPages(gateway.settings.listen.origins)
    if pages:
        app.add_middleware(Preflights, pages=pages)
    app.add_middleware(AccessLog, log=log)
    answer_with_problems(app)
    app.sealed = SealedRoute(SealedEndpoint(gateway).serve, log, Clock(), pages)
    app.router.routes.append(Route(SEALED_PATH, _by_listener, methods=["POST"]))  # for the answers to other methods
    limit = AddressLimit(gateway.settings.limits.calls_per_address)
    limit.install(app)
    gateway.calls.append(limit)
    limited = [Depends(limit.check)]
    app.add_api_route("/v1/manifest", serve_manifest, methods=_READ, include_in_schema=False, dependencies=limited)
    app.add_api_route(OWN_USAGE_PATH, own_usage, methods=_READ, include_in_schema=False, dependencies=limited)
    for path, endpoint in (("/healthz", healthz), ("/readyz", readyz)):
        app.add_api_route(path, endpoint, methods=_READ, include_in_schema=False)
    app.openapi = partial(described, app, PATHS, SECURITY)  # type: ignore[method-assign]
    return app


async def _by_listener(_request: Request) -> Response:
    """A sealed request that came through ASGI: behind another server than ours, which would not bound it."""
    raise Refusal(problems.NOT_READY, retry_after=5.0, noted="sealed requests need the gateway's own listener: `make_server`")


async def serve_manifest(request: Request) -> Response:
    """The document that clients verify, byte for byte as published."""
    gateway: Gateway = request.app.state.gateway
    document = require(gateway.feed).document
    # A cache may keep it, but must ask again each time (RFC 9111 section 5.2.2.4): clients then use a rotated key at once.
    headers = {"etag": etag(document), "cache-control": "no-cache"}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(document, media_type="application/json", headers=headers)


async def own_usage(request: Request) -> Response:
    """What the caller has used of its own limits and its tenant's. A token bound to a key needs a proof for this URL."""
    gateway: Gateway = request.app.state.gateway
    scope, asked = request.scope, Fields.collect(request.scope["headers"])
    url = plain_url(gateway.settings.public_url + OWN_USAGE_PATH)
    access = await gateway.authenticator.authenticate(
        asked.authorization(), address_of(scope), proof=asked.proof(), method=scope["method"], url=url
    )
    scope["state"][KNOWN] = True
    plans = gateway.budgets.plans
    try:
        limits = [each.members() for each in await gateway.budgets.own_usage(access.principal)]
    except (BudgetRefused, FabricError) as exc:
        raise refusal_for(exc) from exc
    who = access.principal
    plan = plans.plan_of(who.tenant, who.plan, who.subject, who.groups)
    told = {"plan": None if plan is None else plan.name, "currency": plans.currency, "limits": limits}
    return JSONResponse(told, headers={"cache-control": "no-store"})


async def healthz() -> Response:
    """Whether the process runs and its event loop turns. It checks nothing else, because a restart would cure nothing else."""
    return JSONResponse({"status": "ok"}, headers={"cache-control": "no-store"})


async def readyz(request: Request) -> Response:
    """Whether requests can be served now, and if not, what is missing."""
    gateway: Gateway = request.app.state.gateway
    missing = gateway.missing()
    manifest = gateway.feed.manifest if gateway.feed.ready else None
    detail = {
        "status": "not ready" if missing else "ready",
        "missing": missing,
        "away": [] if gateway.fabric is None else sorted(gateway.fabric.away()),
        "queues_lost": sorted(gateway.queues.lost),
        "rules": gateway.rules.status.detail(),
        "manifest": None if manifest is None else {"version": manifest.version, "expires_at": manifest.expires_at},
        "manifests_ignored": gateway.feed.ignored,
    }
    headers = {"cache-control": "no-store"}
    if missing:
        headers["retry-after"] = "1"
        request.scope["state"][FACTS] = {"reason": "; ".join(f"{name}: {why}" for name, why in missing.items())}
    return JSONResponse(detail, status_code=503 if missing else 200, headers=headers)
