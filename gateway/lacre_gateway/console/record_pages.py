"""Pages of requests, rules, keys and the audit log."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response, StreamingResponse

from lacre.errors import UsageError
from lacre_gateway.admin import api
from lacre_gateway.console.key_views import KeyViews
from lacre_gateway.console.policy_views import PolicyViews
from lacre_gateway.console.request_index import UNDER_WAY
from lacre_gateway.console.request_views import RequestsAsked, RequestViews
from lacre_gateway.console.site import ConsoleSite, Visit
from lacre_gateway.http.answers import INVALID
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.cases import KEMS
from lacre_gateway.policy.question import AdminAction

_ASKED: Final = ("id", "subject", "tenant", "outcome", "since", "until", "before")
_OF_PRINCIPAL: Final = ("subject", "tenant", "issuer", "plan")
_LISTS: Final = ("groups", "scopes")
_NUMBERS: Final = ("max_tokens", "sealed_bytes", "hour")
_TEXTS: Final = ("action", "pool", "model", "kem", "shape", "address", "gateway")
_MAX_NUMBER: Final = 12  # digits


def install(app: FastAPI, site: ConsoleSite, requests_of: RequestViews, policies: PolicyViews, keys_of: KeyViews) -> None:
    site.page(app, "/console/requests", partial(requests, requests_of))
    site.page(app, "/console/request", partial(request, requests_of))
    site.page(app, "/console/proof", partial(proof, requests_of))
    site.page(app, "/console/policy", partial(policy, policies))
    site.change(app, "/console/policy/test", partial(test, policies), step_up=False)
    site.change(app, "/console/policy/replay", partial(replay, policies), step_up=False)
    site.change(app, "/console/policy/reload", reload)
    site.page(app, "/console/keys", partial(keys, keys_of))
    site.page(app, "/console/audit", partial(audit, keys_of))
    site.page(app, "/console/audit/checkpoint", partial(checkpoint, keys_of))
    site.page(app, "/console/audit/export", partial(export, keys_of))
    site.change(app, "/console/audit/verify", partial(verify, keys_of), step_up=False)


async def requests(views: RequestViews, visit: Visit) -> Response:
    given = {name: value for name in _ASKED if (value := visit.query.get(name, "").strip())}
    asked = RequestsAsked.model_validate(
        {**given, **{name: _moment(given[name]) for name in ("since", "until") if name in given}}
    )
    report = await views.requests(visit.asking, asked)
    outcomes = [UNDER_WAY, *await asyncio.to_thread(lambda: views.index.outcomes)]
    shown = {name: given.get(name, "") for name in _ASKED}
    older = None if report.next is None else urlencode({**given, "before": report.next})
    return visit.show("requests.html", "Requests", report=report, given=shown, outcomes=outcomes, older=older)


async def request(views: RequestViews, visit: Visit) -> Response:
    return visit.show("request.html", "Request", report=await views.detail(visit.asking, _id(visit)))


async def proof(views: RequestViews, visit: Visit) -> Response:
    name = _id(visit)
    return _file(await views.proof(visit.asking, name), f"lacre-proof-{name}.txt")


async def policy(views: PolicyViews, visit: Visit) -> Response:
    return await _policy(views, visit)


async def test(views: PolicyViews, visit: Visit) -> Response:
    try:
        explained = await views.test(visit.asking, _question(visit))
    except UsageError as exc:
        return await _policy(views, visit, fault=str(exc), status=422)
    return await _policy(views, visit, explained=explained)


async def replay(views: PolicyViews, visit: Visit) -> Response:
    candidate = visit.form.get("candidate", "")
    try:
        replayed = await views.replay(visit.asking, candidate)
    except UsageError as exc:
        return await _policy(views, visit, refused=str(exc), candidate=candidate, status=422)
    return await _policy(views, visit, replayed=replayed, candidate=candidate)


async def reload(visit: Visit) -> Response:
    answer = Response()
    await api.reload(answer, visit.asking)
    return RedirectResponse(f"/console/policy?done={'refused' if answer.status_code == 409 else 'reloaded'}", 303)


async def keys(views: KeyViews, visit: Visit) -> Response:
    return visit.show("keys.html", "Keys", report=await views.keys(visit.asking))


async def audit(views: KeyViews, visit: Visit) -> Response:
    return visit.show("audit.html", "Audit", report=await views.audit(visit.asking), verified=None)


async def verify(views: KeyViews, visit: Visit) -> Response:
    verified = await views.verify(visit.asking)
    return visit.show("audit.html", "Audit", report=await views.audit(visit.asking), verified=verified)


async def checkpoint(views: KeyViews, visit: Visit) -> Response:
    report = await views.audit(visit.asking)
    return _file(report.checkpoint, f"lacre-checkpoint-{report.entries}.txt")


async def export(views: KeyViews, visit: Visit) -> Response:
    lines = await views.export(visit.asking)
    name = f"lacre-audit-{time.strftime('%Y%m%d', time.gmtime(visit.gateway.clock()))}.jsonl"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=headers)


async def _policy(views: PolicyViews, visit: Visit, status: int = 200, **facts: Any) -> Response:
    given = {name: visit.form.get(name, "") for name in (*_OF_PRINCIPAL, *_LISTS, *_NUMBERS, *_TEXTS)}
    usual: dict[str, Any] = dict.fromkeys(("explained", "fault", "replayed", "refused", "candidate"))
    pools = visit.gateway.feed.manifest.pools if visit.gateway.feed.ready else {}
    return visit.show(
        "policy.html", "Policy", status, report=await views.policy(visit.asking), given=given,
        actions=[each.value for each in (*Action, *AdminAction)], kems=list(KEMS), shapes=[each.value for each in Shape],
        models=[(pool, model) for pool, served in pools.items() for model in served.models],
        may_reload=visit.site.may(visit, AdminAction.RELOAD), **{**usual, **facts},
    )  # fmt: skip


def _question(visit: Visit) -> dict[str, Any]:
    """The form as a case of the rules has it; empty fields are left open."""
    given = {name: value.strip() for name, value in visit.form.items() if value.strip()}
    who: dict[str, Any] = {name: given[name] for name in _OF_PRINCIPAL if name in given}
    for name in _LISTS:
        if name in given:
            who[name] = given[name].replace(",", " ").split()
    values: dict[str, Any] = {"principal": who, **{name: given[name] for name in _TEXTS if name in given}}
    for name in _NUMBERS:
        if name in given:
            if not given[name].isdecimal() or len(given[name]) > _MAX_NUMBER:
                raise Refusal(INVALID, noted=f"{name}: it must be a whole number")
            values[name] = int(given[name])
    if values.get("action") in set(AdminAction):
        return {name: value for name, value in values.items() if name in ("principal", "action", "gateway", "address", "hour")}
    values.pop("gateway", None)
    return values


def _id(visit: Visit) -> str:
    """Raises ValidationError."""
    return str(RequestsAsked.model_validate({"id": visit.query.get("id", "")}).id)


def _moment(text: str) -> float | str:
    """A date and time of a form, in UTC, as seconds since the epoch; other text stays, and is refused."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return text


def _file(text: str, name: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"', "content-type": "text/plain; charset=utf-8"}
    return Response(text, headers=headers)
