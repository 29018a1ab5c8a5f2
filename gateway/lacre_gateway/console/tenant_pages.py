"""Pages of people's use: all tenants, one tenant with its limits, and the person's own."""

from __future__ import annotations

import csv
import io
import re
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response

from lacre.trust.chain import ConnectionString
from lacre_fabric.work.contract import FabricError
from lacre_gateway.admin import api
from lacre_gateway.admin.reports import TENANT, Reset, Revoke, TopUp
from lacre_gateway.budget.holds import BudgetRefused
from lacre_gateway.budget.limit_fields import UNITS
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.console.request_views import RequestViews
from lacre_gateway.console.site import ConsoleSite, Visit
from lacre_gateway.http.answers import INVALID
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.question import AdminAction
from lacre_gateway.relay.failures import refusal_for

DAYS: Final = 30  # of the table of use
_SCOPED: Final = ("scope", "tenant", "sub", "issuer", "plan", "limit")  # fields of the form that name a budget
_WINDOWED: Final = tuple(kind.value for kind in LimitKind if kind is not LimitKind.CONCURRENT_STREAMS)
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


def install(app: FastAPI, site: ConsoleSite, views: RequestViews) -> None:
    site.page(app, "/console/tenants", tenants)
    site.page(app, "/console/tenants.csv", partial(table, views))
    site.page(app, "/console/tenant", partial(tenant, views))
    site.page(app, "/console/me", me)
    site.change(app, "/console/top-up", top_up)
    site.change(app, "/console/reset", reset)
    site.change(app, "/console/revoke", revoke)


async def tenants(visit: Visit) -> Response:
    return visit.show("tenants.html", "Tenants", report=await api.tenants(visit.asking))


async def tenant(views: RequestViews, visit: Visit) -> Response:
    name = _tenant(visit)
    report = await api.usage(visit.asking, name)
    use = await views.use_of(name, DAYS, visit.gateway.clock())
    return visit.show(
        "tenant.html", name, report=report, use=use, limits=_WINDOWED, plans=sorted(visit.gateway.budgets.plans.plans),
        may_change=visit.site.may(visit, AdminAction.BUDGET), may_revoke=visit.site.may(visit, AdminAction.REVOKE),
    )  # fmt: skip


async def table(views: RequestViews, visit: Visit) -> Response:
    """CSV (RFC 4180): of one tenant its use by day, model and user; else all tenants with what they have used."""
    if "tenant" in visit.query:
        name = _tenant(visit)
        use = await views.use(visit.asking, name, DAYS)
        head = ("day", "model", "user", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "money_micro_units")
        rows = [
            (
                one.day,
                one.model,
                one.subject,
                one.requests,
                one.prompt_tokens,
                one.cached_tokens,
                one.completion_tokens,
                one.money,
            )
            for one in use.uses
        ]
        return _csv(f"lacre-{name}", head, rows)
    report = await api.tenants(visit.asking)
    kinds = [kind.value for kind in LimitKind]
    return _csv(
        "lacre-tenants", ("tenant", "plan", "users", *kinds),
        [(one.tenant, one.plan or "", one.users, *(one.used.get(kind, 0) for kind in kinds)) for one in report.tenants],
    )  # fmt: skip


async def me(visit: Visit) -> Response:
    """Own limits, as `GET /v1/me/usage` has them, and how to use the gateway. For everyone who is signed in."""
    gateway, who = visit.gateway, visit.asking.who
    try:
        own = await gateway.budgets.own_usage(who)
    except (BudgetRefused, FabricError) as exc:
        raise refusal_for(exc) from exc
    plans = gateway.budgets.plans
    plan = plans.plan_of(who.tenant, who.plan, who.subject, who.groups)
    models = (
        sorted({name for pool in gateway.feed.manifest.pools.values() for name in pool.models}) if gateway.feed.ready else []
    )
    return visit.show(
        "me.html", "Me", own=own, units=UNITS, plan=None if plan is None else plan.name, currency=plans.currency, models=models,
        address=str(ConnectionString(gateway.settings.public_url, gateway.settings.root)),
    )  # fmt: skip


async def top_up(visit: Visit) -> Response:
    amount = visit.form.get("amount", "")
    money = visit.form.get("limit") == LimitKind.MONEY_PER_MONTH.value
    if not money and not re.fullmatch("[0-9]{1,16}", amount):
        raise Refusal(INVALID, noted="the amount must be a whole number")
    await api.top_up(visit.asking, TopUp.model_validate({**_named(visit), "amount": amount if money else int(amount)}))
    return _back(visit, "topped-up")


async def reset(visit: Visit) -> Response:
    await api.reset(visit.asking, Reset.model_validate(_named(visit)))
    return _back(visit, "reset")


async def revoke(visit: Visit) -> Response:
    """All tokens that a subject was issued until now."""
    named = {name: value for name in ("sub", "issuer") if (value := visit.form.get(name, "").strip())}
    await api.revoke(visit.asking, Revoke.model_validate(named))
    return _back(visit, "revoked")


def _named(visit: Visit) -> dict[str, Any]:
    return {name: value for name in _SCOPED if (value := visit.form.get(name, "").strip())}


def _back(visit: Visit, done: str) -> Response:
    name = visit.form.get("page", "")
    place = f"/console/tenant?tenant={name}&done={done}" if re.fullmatch(TENANT, name) else f"/console/tenants?done={done}"
    return RedirectResponse(place, 303)


def _tenant(visit: Visit) -> str:
    """Raises Refusal."""
    name = visit.query.get("tenant", "")
    if not re.fullmatch(TENANT, name):
        raise Refusal(INVALID, noted="tenant: string_pattern_mismatch")
    return name


def _csv(name: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Response:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows([_plain(value) for value in row] for row in rows)
    headers = {"content-disposition": f'attachment; filename="{name}.csv"', "content-type": "text/csv; charset=utf-8"}
    return Response(text.getvalue(), headers=headers)


def _plain(value: object) -> object:
    """Text that a spreadsheet shows and does not compute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
