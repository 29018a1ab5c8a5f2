"""Who asked for what, and why it was allowed or refused. Never what was said: the audit log has no field for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field, model_validator

from lacre import problems
from lacre.errors import InvalidMessage
from lacre.evidence.audit_proof import AuditProof
from lacre.runtime import tasks
from lacre_gateway.admin.api import AdminCaller
from lacre_gateway.admin.reports import TENANT, Report
from lacre_gateway.audit import chain
from lacre_gateway.audit.entries import Annex, parse
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.auth.claims import MAX_NAME, is_name
from lacre_gateway.console.log_reading import read_log
from lacre_gateway.console.policy_views import explained
from lacre_gateway.console.reports import (
    RequestDetail,
    RequestReport,
    RequestsReport,
    TenantUseReport,
    UseReport,
)
from lacre_gateway.console.request_index import PAGE, Found, RequestIndex, WantedRequests
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.question import AdminAction
from lacre_gateway.policy.replay import question_of

SOON: Final = 0.2  # seconds that a page waits for the newest entries: then it shows those that are there
EVERY: Final = 5.0  # seconds between two looks at the log
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class RequestsAsked(Report):
    """Which requests; all members may be omitted. Times in seconds since the epoch."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    subject: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    tenant: Annotated[str, Field(pattern=TENANT)] | None = None
    outcome: Annotated[str, Field(pattern="^[a-z -]{1,32}$")] | None = None
    since: Annotated[float, Field(ge=0, lt=2**53)] | None = None
    until: Annotated[float, Field(ge=0, lt=2**53)] | None = None
    before: Annotated[int, Field(ge=1, lt=2**53)] | None = None

    @model_validator(mode="after")
    def _a_name(self) -> Self:
        """It goes into the audit log."""
        if self.subject is not None and not is_name(self.subject):
            raise ValueError("no subject has these characters")
        return self

    @property
    def target(self) -> str | None:
        """For the audit log: whom it is about."""
        named = (("id", self.id), ("subject", self.subject), ("tenant", self.tenant), ("outcome", self.outcome))
        return " ".join(f"{name}={value}" for name, value in named if value is not None) or None


@dataclass(frozen=True, slots=True)
class RequestViews:
    """root: of the audit logs."""

    index: RequestIndex
    root: Path

    async def keep_up(self) -> None:
        while True:
            await asyncio.to_thread(self.index.catch_up)
            await asyncio.sleep(EVERY)

    async def requests(self, asking: AdminCaller, asked: RequestsAsked) -> RequestsReport:
        gateway = await asking.may(AdminAction.AUDIT, asked.target)
        await self._soon()
        wanted = WantedRequests(
            request_id=asked.id, subject=asked.subject, tenant=asked.tenant, outcome=asked.outcome, since=asked.since,
            until=asked.until, before=asked.before,
        )  # fmt: skip
        found = await asyncio.to_thread(self.index.find, wanted, PAGE + 1)
        place = await asyncio.to_thread(lambda: self.index.place)
        origin = gateway.audit.origin
        return RequestsReport(
            requests=[report_of(one) for one in found[:PAGE]], next=found[PAGE - 1].seq if len(found) > PAGE else None,
            indexed=place.index if place is not None and place.origin == origin else 0, entries=gateway.audit.size,
            fault=self.index.fault or None,
        )  # fmt: skip

    async def detail(self, asking: AdminCaller, request_id: str) -> RequestDetail:
        """Raises Refusal if there is none."""
        gateway = await asking.may(AdminAction.AUDIT, f"id={request_id}")
        found = await self._found(request_id)
        members = await read_log(self._entry, found)
        try:
            now = explained(gateway.rules.current.policies, question_of(members))
        except InvalidMessage:
            now = None
        return RequestDetail(
            request=report_of(found), groups=list(members["groups"]), scopes=list(members["scopes"]),
            limits=list(members.get("limits") or ()), reserved_prompt_tokens=members.get("reserved_prompt_tokens"),
            reserved_tokens=members.get("reserved_tokens"), reserved_money=members.get("reserved_money"), now=now,
        )  # fmt: skip

    async def proof(self, asking: AdminCaller, request_id: str) -> str:
        """The proof of its entry under the newest checkpoint (C2SP tlog-proof). Raises Refusal if there is none."""
        await asking.may(AdminAction.AUDIT, f"id={request_id}")
        found = await self._found(request_id)
        return (await read_log(self._proof, found)).text()

    async def use(self, asking: AdminCaller, tenant: str, days: int) -> TenantUseReport:
        gateway = await asking.may(AdminAction.USAGE, tenant)
        return await self.use_of(tenant, days, gateway.clock())

    async def use_of(self, tenant: str, days: int, now: float) -> TenantUseReport:
        """For a view that was permitted already."""
        await self._soon()
        sums = await asyncio.to_thread(self.index.sums, tenant, int(now // 86400) - days + 1)
        return TenantUseReport(
            tenant=tenant, days=days,
            uses=[
                UseReport(
                    day=(_EPOCH + timedelta(days=one.day)).date().isoformat(), model=one.model, subject=one.subject,
                    requests=one.requests, prompt_tokens=one.prompt, cached_tokens=one.cached,
                    completion_tokens=one.completion, money=one.money,
                ) for one in sums
            ],
        )  # fmt: skip

    async def _soon(self) -> None:
        """The newest entries, if they are there soon; the work goes on if not."""
        work = tasks.detach("requests indexed", asyncio.to_thread(self.index.catch_up, SOON))
        await asyncio.wait([work], timeout=SOON)

    async def _found(self, request_id: str) -> Found:
        """Raises Refusal."""
        await self._soon()
        found = await asyncio.to_thread(self.index.find, WantedRequests(request_id=request_id), 1)
        if not found:
            raise Refusal(problems.NOT_FOUND, noted="console: no such request in the index")
        return found[0]

    def _entry(self, found: Found) -> Mapping[str, Any]:
        """The members of its entry, with those of its annex. Raises Refusal, SettingsError or Wrong."""
        reader, index = self._reader(found), found.members["idx"]
        members = parse(reader.entry(index))
        if members.get("annex") is not None:
            annex = parse(reader.entry(index - 1))
            if annex["kind"] == Annex.kind:
                members.update({name: annex[name] for name in ("groups", "scopes", "policies")})
        return members

    def _proof(self, found: Found) -> AuditProof:
        return self._reader(found).proof(found.members["idx"])

    def _reader(self, found: Found) -> LogReader:
        """Raises Refusal if retention erased its log, or SettingsError."""
        for part in reversed(chain.parts(self.root, None)):
            if part.checkpoint.origin == found.members["log"] and not part.erased:
                return LogReader(part.folder, part.key)
        raise Refusal(problems.NOT_FOUND, noted="console: the log of this request was erased")


def report_of(found: Found) -> RequestReport:
    """The members of the index by the names of the report."""
    members = {name: value for name, value in found.members.items() if name != "idx"}
    unreceipted = members.pop("unreceipted")
    return RequestReport(
        number=found.seq, index=found.members["idx"], unreceipted=None if unreceipted is None else bool(unreceipted), **members
    )
