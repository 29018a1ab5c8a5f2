"""The pages, one function each: it asks for the reports, and passes them to its template."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response

from lacre.trust.manifest import Manifest
from lacre_gateway.admin import api
from lacre_gateway.admin.reports import StatusReport, Used, WorkerNamed
from lacre_gateway.console.drawing import DrawnLine, draw
from lacre_gateway.console.reports import MinutesReport
from lacre_gateway.console.site import HOME, ConsoleSite, Visit
from lacre_gateway.console.views import Views
from lacre_gateway.console.words import readable, share
from lacre_gateway.gateway import Gateway
from lacre_gateway.policy.question import AdminAction

_NEAR = 0.8  # of a limit, from which on the overview warns
_AGED = 0.75  # of a manifest's life, after which the overview warns: publishers renew it long before


def install(app: FastAPI, site: ConsoleSite, views: Views) -> None:
    site.page(app, HOME, partial(overview, views))
    site.page(app, "/console/workers", partial(workers, views))
    site.change(app, "/console/drain", drain)
    site.change(app, "/console/workers/drain", drain_worker)
    site.change(app, "/console/workers/resume", resume_worker)


async def overview(views: Views, visit: Visit) -> Response:
    """Someone whom no rule permits it gets the page that everybody may see."""
    if not visit.site.may(visit, AdminAction.USAGE):
        return RedirectResponse("/console/me", 303)
    status = await api.status(visit.request, visit.asking)
    day, feed = await views.last_day(visit.gateway), visit.gateway.feed
    now, burn = int(visit.gateway.clock() // 60), await views.burn.most(visit.gateway)
    return visit.show(
        "overview.html", "Overview", status=200, report=status, alerts=alerts(visit.gateway, status) + _nearly_used(burn),
        drawings=_drawings(day, now), day=_sums(day), burn=burn,
        currency=visit.gateway.budgets.plans.currency, manifest=feed.manifest if feed.ready else None,
    )  # fmt: skip


async def workers(views: Views, visit: Visit) -> Response:
    report = await views.workers(visit.asking)
    may = {
        "may_drain": visit.site.may(visit, AdminAction.DRAIN), "may_order": visit.site.may(visit, AdminAction.DRAIN_WORKER)
    }  # fmt: skip
    return visit.show("workers.html", "Workers", report=report, **may)


async def drain(visit: Visit) -> Response:
    await api.drain(visit.asking)
    return RedirectResponse("/console/workers?done=draining", 303)


async def drain_worker(visit: Visit) -> Response:
    await api.drain_worker(visit.asking, _worker(visit))
    return RedirectResponse("/console/workers?done=worker-drained", 303)


async def resume_worker(visit: Visit) -> Response:
    await api.resume_worker(visit.asking, _worker(visit))
    return RedirectResponse("/console/workers?done=worker-resumed", 303)


def _worker(visit: Visit) -> WorkerNamed:
    """Raises ValidationError."""
    return WorkerNamed.model_validate({name: visit.form.get(name, "") for name in ("pool", "region", "node")})


def alerts(gateway: Gateway, status: StatusReport) -> list[tuple[str, str]]:
    """What someone should look at: a word, and what it is."""
    found = [(name.replace("_", " "), why) for name, why in status.missing.items()]
    if gateway.fabric is not None:
        found += [(f"pool {pool}", "its answers cannot reach this gateway now") for pool in sorted(gateway.fabric.away())]
    refused = gateway.rules.status.refused
    if refused is not None:
        found.append(("rules", f"the rules on the disk do not hold ({refused.fault}): the last good ones stay"))
    if status.settings is not None and status.settings.fault is not None:
        found.append(("settings", f"the file on the disk was refused: {status.settings.fault}"))
    if status.settings is not None and status.settings.restart:
        found.append(("settings", f"a restart is needed for {', '.join(status.settings.restart)}"))
    if gateway.feed.ready and _aged(gateway.feed.manifest, gateway.clock()):
        found.append(("manifest", "most of its life is over, and no newer one came: is the publisher running?"))
    return found + [
        (f"pool {pool}", "no live worker serves it")
        for pool, regions in status.pools.items() if not any(at.workers for at in regions.values())
    ]  # fmt: skip


def _nearly_used(burn: list[Used]) -> list[tuple[str, str]]:
    return [
        (f"budget of {line.name}", f"{share(line.used, line.ceiling)} of {readable(line.kind)} is used")
        for line in burn if line.used >= _NEAR * (line.ceiling or 0)
    ]  # fmt: skip


def _aged(manifest: Manifest, now: float) -> bool:
    return now - manifest.issued_at > _AGED * (manifest.expires_at - manifest.issued_at)


def _sums(day: MinutesReport) -> dict[str, int]:
    minutes = day.minutes
    return {
        "answered": sum(one.answered for one in minutes), "refused": sum(one.refused for one in minutes),
        "failed": sum(one.failed for one in minutes),
        "tokens": sum(one.prompt_tokens + one.completion_tokens for one in minutes),
        "cached": sum(one.cached_tokens for one in minutes), "prompt": sum(one.prompt_tokens for one in minutes),
    }  # fmt: skip


def _drawings(day: MinutesReport, now: int) -> list[tuple[str, str, object, list[str]]]:
    """Of each: its heading, its unit, the drawing, and the names of its lines."""
    at = [one.at // 60 for one in day.minutes]

    def line(name: str, member: str, by: float = 1, *, whole: bool = True) -> DrawnLine:
        values = [getattr(one, member) for one in day.minutes]
        return DrawnLine(name, list(zip(at, [None if v is None else v / by for v in values], strict=True)), whole)

    asked = [
        ("Requests", "a minute", [line("answered", "answered"), line("refused", "refused"), line("failed", "failed")]),
        ("First byte", "ms", [line("95 %", "most_ms", whole=False), line("half", "half_ms")]),
        ("Tokens", "a second", [line("completion", "completion_tokens", 60), line("prompt", "prompt_tokens", 60)]),
        ("Slots", "highest", [line("slots", "slots", whole=False), line("busy", "busy", whole=False),
                              line("queued", "queued", whole=False)]),
    ]  # fmt: skip
    return [(name, unit, draw(lines, now, name, unit), [one.name for one in lines]) for name, unit, lines in asked]
