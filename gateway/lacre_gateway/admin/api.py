"""The admin API and `/metrics`, as a separate app for a separate listener (`[admin]` in the settings).

Rules:
- Every call except `/metrics` and the API's description needs a token of an issuer in the settings. It also needs a policy that
  permits its `admin:` action on this `Gateway`.
- The caller is known before a byte of a body is read, and a body has at most `MAX_BODY` bytes. Refusals count as for sealed
  requests.
- The audit log durably holds the request, its caller and the decision before anything is done or answered.
- Answers hold fixed words, numbers, digests, and names from the settings and the manifest. Errors are problem documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.types import Message

from lacre import __version__, problems
from lacre.errors import LacreError, SettingsError, UsageError
from lacre_gateway.admin import worker_orders
from lacre_gateway.admin.gauges import Gauges
from lacre_gateway.admin.reports import (
    TENANT,
    BudgetChanged,
    BudgetNamed,
    Draining,
    PoolReport,
    Reloaded,
    Reset,
    Revocations,
    Revoke,
    Revoked,
    Rules,
    SettingsReport,
    StatusReport,
    TenantReport,
    TenantsReport,
    TopUp,
    UsageReport,
    Used,
    WorkerNamed,
    WorkerOrdered,
)
from lacre_gateway.audit.entries import AdminIntent
from lacre_gateway.auth.revocation import issuer_named
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.callers import named_scope
from lacre_gateway.budget.windows import ends
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.access_log import KNOWN, AccessLog, RequestLog
from lacre_gateway.http.address_limit import AddressLimit
from lacre_gateway.http.answers import (
    BODY_TOO_LARGE,
    BODY_TOO_SLOW,
    INVALID,
    PROBLEM,
    answer_with_problems,
    described,
    problem_response,
)
from lacre_gateway.http.headers import Fields, address_of
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.observe.metrics import CONTENT_TYPE, States
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.policy.denial import because
from lacre_gateway.policy.question import AdminAction, AdminQuestion
from lacre_gateway.relay.failures import CALLERS_FAULT, refusal_for

# The refusals that any call may get; each is a row of `lacre.problems`.
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = dict.fromkeys((401, 403, 408, 413, 422, 429, 503), PROBLEM)
_OF_WORKERS: Final[dict[int | str, dict[str, Any]]] = dict.fromkeys((404, 409, 504), PROBLEM)


def create_admin(gateway: Gateway) -> FastAPI:
    """An ASGI app over `gateway`; it starts and stops none of its parts."""
    app = FastAPI(
        title="Lacre gateway: administration", version=__version__, openapi_url="/openapi.json", docs_url=None, redoc_url=None,
        redirect_slashes=False, responses=_REFUSALS,
    )  # fmt: skip
    gauges = Gauges(gateway)
    States(gateway.metrics, [gauges.read])
    app.state.gateway, app.state.gauges = gateway, gauges
    app.state.limit = AddressLimit(gateway.settings.limits.calls_per_address)
    app.state.limit.install(app)
    gateway.calls.append(app.state.limit)
    app.add_middleware(AccessLog, log=RequestLog(gateway.log, gateway.lines))
    answer_with_problems(app)
    app.add_exception_handler(LacreError, _mapped)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.include_router(_open)
    app.include_router(_routes)
    app.openapi = partial(described, app)  # type: ignore[method-assign]
    return app


MAX_BODY: Final = 16 * 1024  # bytes; two names and an issuer need far less


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _Limited(APIRoute):
    """A call of an address that does not call too often."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def limited(request: Request) -> Response:
            await request.app.state.limit.check(request)
            return await handler(request)

        return limited


class _Guarded(APIRoute):
    """Likewise, and only for known callers. FastAPI by itself would read an unknown caller's body first."""

    def get_route_handler(self) -> Handler:
        handler, takes_body = super().get_route_handler(), self.body_field is not None

        async def guarded(request: Request) -> Response:
            await request.app.state.limit.check(request)
            asking = await identified(request, Fields.collect(request.scope["headers"]).authorization())
            request.scope["state"][_CALLER] = asking
            with charged(asking):
                if takes_body:
                    request = _with_body(request, await body_of(request, asking.gateway.settings.limits.body_timeout))
                return await handler(request)

        return guarded


def guarded_router() -> APIRouter:
    """For further calls of known callers."""
    return APIRouter(route_class=_Guarded)


@contextmanager
def charged(asking: AdminCaller) -> Iterator[None]:
    """Counts a refusal of the body against the caller. Raises Refusal if there were too many."""
    refusals, subject = asking.gateway.refusals, (asking.who.issuer, asking.who.subject)
    refusals.check(subject, asking.address)
    try:
        yield
    except (Refusal, RequestValidationError, UsageError) as exc:
        if not isinstance(exc, Refusal) or exc.problem.status in CALLERS_FAULT:
            refusals.refused(subject, asking.address)
        raise


async def body_of(request: Request, seconds: float) -> bytes:
    """Raises Refusal."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                if len(body) + len(piece) > MAX_BODY:
                    raise Refusal(BODY_TOO_LARGE)
                body += piece
    except (TimeoutError, ClientDisconnect) as exc:
        raise Refusal(BODY_TOO_SLOW) from exc
    return bytes(body)


def _with_body(request: Request, body: bytes) -> Request:
    """The same request, with its body to be read again."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)


_OURS: Final = re.compile(r"[a-z_]{1,32}|[0-9]{1,6}")
_MOST_NOTED: Final = 4  # wrong arguments that the log names
_CALLER: Final = "caller"
_open: Final = APIRouter(route_class=_Limited)
_routes: Final = APIRouter(route_class=_Guarded)
_bearer: Final = HTTPBearer(auto_error=False, description="An access token of one of the gateway's issuers.")


@dataclass(frozen=True, slots=True)
class AdminCaller:
    """The caller whom the token names; nothing is permitted yet."""

    gateway: Gateway
    who: Principal
    address: str
    request_id: str

    @property
    def actor(self) -> str:
        return f"{self.who.tenant}/{self.who.subject}"

    async def may(self, action: AdminAction, target: str | None = None) -> Gateway:
        """The gateway, if this caller may do this; recorded either way. target: whom it is about. Raises Refusal,
        AuditUnavailable.
        """
        gateway, who = self.gateway, self.who
        question = AdminQuestion(who, action, gateway.settings.gateway, self.address, round(gateway.clock(), 3))
        decision = gateway.rules.decide(question)
        entry = AdminIntent(
            request_id=self.request_id,
            time=question.time,
            subject=who.subject,
            tenant=who.tenant,
            issuer=who.issuer,
            jti=None if who.jti is None else hashlib.sha256(who.jti.encode()).hexdigest(),
            address=self.address,
            gateway=question.gateway,
            action=action.value,
            target=target,
            groups=who.groups,
            scopes=who.scopes,
            plan=who.plan,
            decision="allow" if decision.allowed else "deny",
            policies=decision.policies,
            policy_set=decision.policy_set,
            entities=decision.entities,
        )
        await gateway.audit.append(entry)
        gateway.metrics.administered(action.value, "permitted" if decision.allowed else "denied")
        if not decision.allowed:
            raise Refusal(problems.FORBIDDEN, noted=because(decision.policies), facts={"action": action.value})
        return gateway


async def identified(request: Request, authorization: bytes | None) -> AdminCaller:
    """authorization: the value of that header. Raises Refusal.

    A token that is bound to a key is refused: proofs of possession are for sealed requests.
    """
    gateway: Gateway = request.app.state.gateway
    address = address_of(request.scope)
    access = await gateway.authenticator.authenticate(authorization, address)
    request.scope["state"][KNOWN] = True
    return AdminCaller(gateway, access.principal, address, request.scope["state"]["request_id"])


async def caller(request: Request, _: Annotated[object, Security(_bearer)]) -> AdminCaller:
    """A dependency: the caller that the route has identified."""
    found: AdminCaller = request.scope["state"][_CALLER]
    return found


Asking = Annotated[AdminCaller, Depends(caller)]


@_open.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
async def metrics(request: Request) -> Response:
    """All metrics, in Prometheus's text format. Needs no token."""
    await request.app.state.gauges.refresh()
    gateway: Gateway = request.app.state.gateway
    return Response(gateway.metrics.show(), headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})


@_routes.get("/v1/status")
async def status(request: Request, asking: Asking) -> StatusReport:
    """The state of this process: what is missing, running requests, its workers, its rules, its audit log."""
    gateway = await asking.may(AdminAction.USAGE)
    gauges: Gauges = request.app.state.gauges
    await gauges.refresh()
    live, rules = gateway.metrics.live, gateway.rules.status
    return StatusReport(
        gateway=gateway.settings.instance,
        version=__version__,
        missing=gateway.missing(),
        draining=gateway.draining,
        seconds=round(time.monotonic() - gateway.metrics.since, 3),
        requests=len(live),
        streams=sum(each.started for each in live),
        pools={
            pool: {region: PoolReport.of(*seen) for region, seen in regions.items()} for pool, regions in gauges.pools().items()
        },
        audit_entries=gateway.audit.size,
        rules=Rules(policy_set=rules.policy_set, since=rules.since, reloads=rules.reloads, refusals=rules.refusals),
        settings=None
        if (settings := gateway.reloading) is None
        else SettingsReport(restart=list(settings.restart), fault=settings.refused or None),
    )


@_routes.get("/v1/usage")
async def usage(asking: Asking, tenant: Annotated[str, Query(pattern=TENANT)]) -> UsageReport:
    """How much of their budgets a tenant and its users have used, by limit and window, as the fabric has it."""
    gateway = await asking.may(AdminAction.USAGE, tenant)
    used = [Used.of(line) for line in await gateway.budgets.usage(tenant)]
    return UsageReport(tenant=tenant, currency=gateway.budgets.plans.currency, budgets=used)


@_routes.get("/v1/tenants")
async def tenants(asking: Asking) -> TenantsReport:
    """Every tenant that plans.toml names or that has used something lately, with its plan and usage, as the fabric has it."""
    gateway = await asking.may(AdminAction.USAGE)
    found, complete = await gateway.budgets.tenants()
    listed = [TenantReport.of(name, use) for name, use in found.items()]
    return TenantsReport(currency=gateway.budgets.plans.currency, complete=complete, tenants=listed)


@_routes.post("/v1/budgets/top-up")
async def top_up(asking: Asking, asked: TopUp) -> BudgetChanged:
    """Raises a limit until its window ends, at all gateways. The audit log has the caller and the amount."""
    return await _changed(asking, asked, asked.amount)


@_routes.post("/v1/budgets/reset")
async def reset(asking: Asking, asked: Reset) -> BudgetChanged:
    """Gives back the used amount of a limit in its window, at all gateways. The audit log has the caller and the amount."""
    return await _changed(asking, asked, None)


async def _changed(asking: AdminCaller, asked: BudgetNamed, amount: int | None) -> BudgetChanged:
    """Raises Refusal, UsageError or FabricUnavailable."""
    number = asked.id or secrets.token_hex(8)
    raise_by = "" if amount is None else f"+{amount}"
    # The change may be stored although this process ends before it records the result: so the intent names it already.
    gateway = await asking.may(AdminAction.BUDGET, f"{asked.target}{raise_by}#{number}")
    issuer = "" if asked.sub is None else issuer_named(gateway.settings.issuers, asked.issuer).issuer
    scope = named_scope(
        gateway.budgets.plans, asked.scope, asked.limit, plan=asked.plan or "", tenant=asked.tenant or "", issuer=issuer,
        subject=asked.sub or "",
    )  # fmt: skip
    if scope is None:
        noted = f"plans.toml has no {asked.limit.value} for this budget: {asked.target}"
        raise Refusal(INVALID, details={"limit": asked.limit.value, "reason": "no-such-limit"}, noted=noted)
    added, window = await gateway.change_budget(scope, asked.limit, amount, number, asking.actor)
    return BudgetChanged(
        id=number, key=scope.key, name=scope.name, limit=asked.limit.value, window=window, added=added,
        resets_at=ends(asked.limit, window),
    )  # fmt: skip


@_routes.get("/v1/revocations")
async def revocations(asking: Asking) -> Revocations:
    """The revocations that this process knows. Tokens and subjects are named by digest, so that nobody keeps a list of them."""
    gateway = await asking.may(AdminAction.REVOKE)
    return Revocations(current=gateway.revocations.current, revocations=[Revoked.of(each) for each in gateway.revocations])


@_routes.post("/v1/revocations", status_code=201)
async def revoke(asking: Asking, asked: Revoke) -> Revoked:
    """Revokes a token, or all tokens that a subject was issued until now: here at once, at other gateways within a second.

    The revocation is on the fabric when this is answered, and cannot be taken back.
    """
    target = asked.sub if asked.jti is None else hashlib.sha256(asked.jti.encode()).hexdigest()
    gateway = await asking.may(AdminAction.REVOKE, target)
    return Revoked.of(
        await gateway.revoke(jti=asked.jti, subject=asked.sub, issuer=asked.issuer, until=asked.until, actor=asking.actor)
    )


@_routes.post("/v1/reload", responses={409: {"model": Reloaded}})
async def reload(response: Response, asking: Asking) -> Reloaded:
    """Activates the settings and the rules that are on the disk. 409: either does not hold, and the last good ones stay.

    Several processes are all told to; the answer is this one's.
    """
    gateway = await asking.may(AdminAction.RELOAD)
    try:
        await gateway.reload(asking.actor)
    except PolicyError as exc:
        refused: PolicyError | None = exc
    else:
        refused = None
    settings = await _settings(gateway, asking.actor)  # last: it may move this listener, which ends a while after that
    if refused is not None or (settings is not None and settings.fault is not None):
        response.status_code = 409
    return Reloaded(
        taken=refused is None,
        policy_set=gateway.rules.status.policy_set,
        fault=None if refused is None else refused.fault,
        file=None if refused is None else refused.place or None,
        settings=settings,
    )


async def _settings(gateway: Gateway, actor: str) -> SettingsReport | None:
    """None if they came from no file."""
    if gateway.reloading is None:
        return None
    try:
        changes = await gateway.reloading.reload(actor)
    except SettingsError as exc:
        return SettingsReport(restart=list(gateway.reloading.restart), fault=str(exc))
    return SettingsReport(changed=list(changes.changed), restart=list(changes.restart))


@_routes.post("/v1/drain", status_code=202)
async def drain(asking: Asking) -> Draining:
    """Ends this process as SIGTERM does: not ready from now on, gone when its streams have finished."""
    gateway = await asking.may(AdminAction.DRAIN)
    gateway.drain()
    return Draining(draining=True, streams=sum(each.started for each in gateway.metrics.live))


@_routes.post("/v1/workers/drain", responses=_OF_WORKERS)
async def drain_worker(asking: Asking, asked: WorkerNamed) -> WorkerOrdered:
    """Has one worker take no more work. Its streams finish, and it stays ready to be resumed, until its process ends."""
    return await _ordered(asking, asked, drain=True)


@_routes.post("/v1/workers/resume", responses=_OF_WORKERS)
async def resume_worker(asking: Asking, asked: WorkerNamed) -> WorkerOrdered:
    """Has a drained worker take work again."""
    return await _ordered(asking, asked, drain=False)


async def _ordered(asking: AdminCaller, asked: WorkerNamed, *, drain: bool) -> WorkerOrdered:
    """Raises Refusal or FabricUnavailable."""
    what = "drain" if drain else "resume"
    gateway = await asking.may(AdminAction.DRAIN_WORKER, f"{asked.target}#{what}")
    return await worker_orders.order(gateway, asked, asking.request_id, drain=drain)


async def _mapped(request: Request, error: Exception) -> Response:
    """Failures of the fabric or the audit log, and impossible requests, as problem documents."""
    return await _invalid(request, error) if isinstance(error, UsageError) else problem_response(request, refusal_for(error))


async def _invalid(request: Request, error: Exception) -> Response:
    """Does not echo the request. The log gets which arguments do not fit, and none of their values."""
    if isinstance(error, RequestValidationError):
        noted = "; ".join(f"{_place(each['loc'])}: {each['type']}" for each in error.errors()[:_MOST_NOTED])
    else:
        noted = str(error)
    return problem_response(request, Refusal(INVALID, noted=noted))


def _place(names: Sequence[object]) -> str:
    """Names of ours; another name is the caller's own text."""
    return ".".join(str(name) if _OURS.fullmatch(str(name)) else "?" for name in names)
