"""The calls of the admin API that the console adds: what its pages show, as JSON."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query
from starlette.responses import Response

from lacre_gateway.admin.api import Asking, guarded_router
from lacre_gateway.admin.reports import TENANT, Report
from lacre_gateway.console.key_views import KeyViews
from lacre_gateway.console.policy_views import PolicyViews
from lacre_gateway.console.reports import (
    AuditReport,
    ExplainedReport,
    KeysReport,
    MinutesReport,
    PolicyReport,
    ReplayReport,
    RequestDetail,
    RequestsReport,
    TenantUseReport,
    VerifiedReport,
    WorkersReport,
)
from lacre_gateway.console.request_views import RequestsAsked, RequestViews
from lacre_gateway.console.views import Views

Named = Annotated[str, Query(pattern="^[0-9a-f]{32}$")]


class ReplayAsked(Report):
    """candidate: the text of Cedar policies."""

    candidate: str


def install(app: FastAPI, views: Views, requests_of: RequestViews, policies: PolicyViews, keys_of: KeyViews) -> None:
    router = guarded_router()

    @router.get("/v1/minutes")
    async def minutes(asking: Asking) -> MinutesReport:
        """What this process did in each minute of the last 24 hours."""
        return await views.minutes(asking)

    @router.get("/v1/workers")
    async def workers(asking: Asking) -> WorkersReport:
        """The live workers by their presence, and the models of the manifest."""
        return await views.workers(asking)

    @router.get("/v1/requests")
    async def requests(asking: Asking, asked: Annotated[RequestsAsked, Query()]) -> RequestsReport:
        """The requests of this gateway's audit log, the newest first, 50 at a time."""
        return await requests_of.requests(asking, asked)

    @router.get("/v1/requests/detail")
    async def detail(asking: Asking, id: Named) -> RequestDetail:
        """One request, and what the rules in force say of it."""
        return await requests_of.detail(asking, id)

    @router.get("/v1/requests/proof", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def proof(asking: Asking, id: Named) -> Response:
        """The proof of a request's entry under the newest checkpoint (C2SP tlog-proof)."""
        return Response(await requests_of.proof(asking, id), media_type="text/plain")

    @router.get("/v1/requests/usage")
    async def use(
        asking: Asking, tenant: Annotated[str, Query(pattern=TENANT)], days: Annotated[int, Query(ge=1, le=366)] = 30
    ) -> TenantUseReport:
        """What a tenant's users did by day, model and user, as this gateway's audit log has it."""
        return await requests_of.use(asking, tenant, days)

    @router.get("/v1/policy")
    async def policy(asking: Asking) -> PolicyReport:
        """The rules in force, with their text."""
        return await policies.policy(asking)

    @router.post("/v1/policy/test")
    async def test(asking: Asking, asked: dict[str, Any]) -> ExplainedReport:
        """What each rule says to a question, written as a case of the rules. Omitted members stay open."""
        return await policies.test(asking, asked)

    @router.post("/v1/policy/replay")
    async def replay(asking: Asking, asked: ReplayAsked) -> ReplayReport:
        """Decides the log's newest requests again, by other policies under the schema in force."""
        return await policies.replay(asking, asked.candidate)

    @router.get("/v1/keys")
    async def keys(asking: Asking) -> KeysReport:
        """The public keys in use, by the manifest, and the gateway's certificate."""
        return await keys_of.keys(asking)

    @router.get("/v1/checkpoint")
    async def checkpoint(asking: Asking) -> AuditReport:
        """The state of the audit log, with its newest checkpoint."""
        return await keys_of.audit(asking)

    @router.post("/v1/audit/verify")
    async def verify(asking: Asking) -> VerifiedReport:
        """Verifies every byte of the audit logs."""
        return await keys_of.verify(asking)

    app.include_router(router)
