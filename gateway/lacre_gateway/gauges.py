"""What a running gateway's state looks like in numbers: read from its parts when Prometheus asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from prometheus_client.core import Metric

from lacre_fabric.work import Capacity, FabricError
from lacre_gateway.metrics import Labelled, by_label, gauge

if TYPE_CHECKING:
    from lacre_gateway.state import Gateway

_BACKLOG_LIMIT: Final = 1.0  # seconds that a look at the queues may take; a scrape must not hang on the fabric


class Gauges:
    """Give its `read` to `metrics.States`. `refresh` asks what only the fabric knows."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._backlog: dict[str, int] = {}

    async def refresh(self) -> None:
        """Looks at the pools' queues; where that cannot be done, nothing is said of them."""
        fabric, backlog = self._gateway.fabric, {}
        if fabric is not None and self._gateway.feed.ready:
            with suppress(FabricError, TimeoutError):
                async with asyncio.timeout(_BACKLOG_LIMIT):
                    for pool in self._gateway.feed.manifest.pools:
                        backlog[pool] = await fabric.backlog(pool)
        self._backlog = backlog

    def read(self) -> Iterator[Metric]:
        gateway = self._gateway
        yield gauge("lacre_ready", "Whether requests can be served now.", not gateway.missing())
        yield gauge("lacre_draining", "Whether this process is about to end.", gateway.draining)
        connected = gateway.fabric is not None and gateway.fabric.connected
        yield gauge("lacre_fabric_connected", "Whether there is a connection to NATS.", connected)
        yield gauge(
            "lacre_audit_writable", "Whether the last attempt to write the audit log succeeded.", gateway.audit.writable
        )
        rules = gateway.rules.status
        yield gauge("lacre_rules_since_timestamp_seconds", "When the rules that decide took over.", rules.since)
        yield gauge("lacre_rules_reloads", "How often other ones took over since the start.", rules.reloads)
        yield gauge("lacre_rules_refusals", "How often others were refused since the start.", rules.refusals)
        yield gauge(
            "lacre_rules_refused", "Whether the rules on the disk are other ones, and do not hold.", rules.refused is not None
        )
        yield gauge("lacre_audit_entries", "Entries in the audit log.", gateway.audit.size)
        if gateway.feed.ready:
            manifest = gateway.feed.manifest
            yield gauge("lacre_manifest_version", "Version of the manifest that is served.", manifest.version)
            yield gauge("lacre_manifest_expiry_timestamp_seconds", "When it expires.", manifest.expires_at)
        yield from self._families()

    def pools(self) -> dict[str, tuple[Capacity, int | None]]:
        """Each pool of the manifest: its live workers, and how many requests wait, as of the last `refresh`."""
        feed, fabric = self._gateway.feed, self._gateway.fabric
        seen = {} if fabric is None else fabric.capacity()
        names = tuple(feed.manifest.pools) if feed.ready else ()
        return {pool: (seen.get(pool, Capacity()), self._backlog.get(pool)) for pool in names}

    def _families(self) -> Iterator[Metric]:
        pools = self.pools()
        present = {pool: at for pool, (at, _) in pools.items()}
        backlog = {pool: count for pool, (_, count) in pools.items() if count is not None}
        workers: Labelled = {(pool,): at.workers for pool, at in present.items()}
        slots: Labelled = {(pool, state): getattr(at, state) for pool, at in present.items() for state in ("busy", "free")}
        queued: Labelled = {(pool,): count for pool, count in backlog.items()}
        demand: Labelled = {(pool,): count + present[pool].busy for pool, count in backlog.items()}
        yield by_label("lacre_workers", "Live workers, by their presence.", ("pool",), workers)
        yield by_label("lacre_worker_slots", "Their slots, by their presence.", ("pool", "state"), slots)
        yield by_label("lacre_queue_requests", "Requests that no worker has taken yet.", ("pool",), queued)
        yield by_label("lacre_pool_demand", "Backlog and busy slots: what to scale workers by.", ("pool",), demand)
