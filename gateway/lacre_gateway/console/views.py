"""What pages and calls show: each is a decision, an audit entry and a report. Both ask here, so neither shows more."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from lacre_fabric.work.contract import FabricError
from lacre_gateway.admin.api import AdminCaller
from lacre_gateway.admin.reports import Used
from lacre_gateway.console.minutes import MinuteStore
from lacre_gateway.console.reports import MinuteReport, MinutesReport, ServedModelReport, WorkerReport, WorkersReport
from lacre_gateway.console.sampling import GatewaySampler
from lacre_gateway.gateway import Gateway
from lacre_gateway.policy.question import AdminAction

DAY: Final = 1440  # minutes
_KEPT: Final = 60.0  # seconds: a list of all budgets costs a round trip for each of their parts
_MOST: Final = 6  # budgets of the overview


class BudgetBurn:
    """The tenants' limits that are used most, at most a minute old."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._lines: list[Used] = []
        self._reading = asyncio.Lock()

    async def most(self, gateway: Gateway) -> list[Used]:
        """For a view that was permitted already. If the fabric is away, as they were."""
        async with self._reading:
            if gateway.clock() - self._read_at >= _KEPT:
                with suppress(FabricError):
                    found, _ = await gateway.budgets.tenants()
                    lines = [Used.of(line) for use in found.values() for line in use.budgets if line.ceiling]
                    self._lines = sorted(lines, key=lambda line: -line.used / (line.ceiling or 1))[:_MOST]
                    self._read_at = gateway.clock()
        return self._lines


@dataclass(frozen=True, slots=True)
class Views:
    """The console's own sources. burn: the limits that are used most."""

    store: MinuteStore
    sampler: GatewaySampler
    burn: BudgetBurn

    async def minutes(self, asking: AdminCaller) -> MinutesReport:
        gateway = await asking.may(AdminAction.USAGE)
        return await self.last_day(gateway)

    async def last_day(self, gateway: Gateway) -> MinutesReport:
        """For a view that was permitted already."""
        found = await asyncio.to_thread(self.store.since, int(gateway.clock() // 60) - DAY)
        found.append(self.sampler.unfinished)
        return MinutesReport(
            minutes=[
                MinuteReport(
                    at=60 * one.at, answered=one.answered, refused=one.refused, failed=one.failed, half_ms=one.half,
                    most_ms=one.most, prompt_tokens=one.prompt, cached_tokens=one.cached, completion_tokens=one.completion,
                    queued=one.queued, busy=one.busy, slots=one.slots, workers=one.workers,
                ) for one in found
            ]
        )  # fmt: skip

    async def workers(self, asking: AdminCaller) -> WorkersReport:
        gateway = await asking.may(AdminAction.USAGE)
        pools = gateway.feed.manifest.pools if gateway.feed.ready else {}
        seen = {} if gateway.fabric is None else gateway.fabric.seen()
        workers = [
            WorkerReport(
                pool=pool, region=region, node=node, draining=not said.models, busy=said.busy, free=said.free,
                # A worker chooses the names in its presence: only those of the manifest are shown.
                models=[name for name in said.models if name in pools[pool].models], prompt_tokens=said.prompt,
                cached_tokens=said.cached, generated_tokens=said.generated,
                tokens_per_second=self.sampler.rate((pool, region, node)), version=said.version, drained=said.drained,
                hears=said.hears,
            ) for (pool, region, node), said in sorted(seen.items()) if pool in pools
        ]  # fmt: skip
        models = [
            ServedModelReport(
                pool=name, model=model, sha256=list(entry.sha256), context=entry.context, max_output=entry.max_output,
                workers=sum(one.pool == name and model in one.models for one in workers),
            ) for name, pool in sorted(pools.items()) for model, entry in pool.models.items()
        ]  # fmt: skip
        return WorkersReport(workers=workers, models=models)
