"""The state of a running gateway in numbers, read from its parts when Prometheus asks."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, Metric

from lacre.runtime import tasks
from lacre_fabric.work.contract import Backlog, Capacity, FabricError
from lacre_gateway.admin import model_metrics
from lacre_gateway.observe.metrics import Labelled, by_label, gauge

if TYPE_CHECKING:
    from lacre_gateway.gateway import Gateway

_BACKLOG_LIMIT: Final = 1.0  # seconds for reading the queues; a scrape must not hang on the fabric


class Gauges:
    """Pass its `read` to `metrics.States`. `refresh` asks for what only the fabric knows."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._queues: dict[tuple[str, str], Backlog] = {}  # by pool and region

    async def refresh(self) -> None:
        """Reads the queues; if that fails, their gauges are omitted."""
        places = list(self._places())
        counts = await tasks.together(*(self._ask(*place) for place in places))
        self._queues = {place: count for place, count in zip(places, counts, strict=True) if count is not None}

    async def _ask(self, pool: str, region: str) -> Backlog | None:
        fabric, feed = self._gateway.fabric, self._gateway.feed
        served = feed.manifest.pools.get(pool) if feed.ready else None
        if fabric is not None and served is not None:
            with suppress(FabricError, TimeoutError):
                async with asyncio.timeout(_BACKLOG_LIMIT):
                    return await fabric.backlog(pool, region, tuple(served.models))
        return None

    def _places(self) -> dict[tuple[str, str], Capacity]:
        """The capacity of each pool of the manifest, in the gateway's own region and in every region with live workers."""
        feed, fabric = self._gateway.feed, self._gateway.fabric
        pools = feed.manifest.pools if feed.ready else {}
        seen = {} if fabric is None else fabric.capacity()
        own = self._gateway.settings.nats.region
        return {(pool, own): Capacity() for pool in pools} | {at: present for at, present in seen.items() if at[0] in pools}

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
        yield gauge("lacre_rules_reloads", "How often new rules took over since the start.", rules.reloads)
        yield gauge("lacre_rules_refusals", "How often new rules were refused since the start.", rules.refusals)
        yield gauge("lacre_rules_refused", "Whether the disk has new rules that do not hold.", rules.refused is not None)
        yield gauge("lacre_body_bytes", "Bytes of sealed bodies that are held now.", gateway.bodies.held)
        yield from self._of_doors()
        yield gauge("lacre_audit_entries", "Entries in the audit log.", gateway.audit.size)
        yield CounterMetricFamily(
            "lacre_manifests_ignored", "Manifests on the fabric older than one seen before.", value=gateway.feed.ignored
        )
        if gateway.feed.ready:
            manifest = gateway.feed.manifest
            yield gauge("lacre_manifest_version", "Version of the manifest that is served.", manifest.version)
            yield gauge("lacre_manifest_expiry_timestamp_seconds", "When it expires.", manifest.expires_at)
        yield from self._families()

    def _of_doors(self) -> Iterator[Metric]:
        doors = self._gateway.doors
        held: Labelled = {(name,): door.held_now for name, door in doors.items()}
        cut: Labelled = {(name,): door.cut for name, door in doors.items()}
        refused: Labelled = {(name, str(status)): n for name, door in doors.items() for status, n in door.refused.items()}
        yield by_label("lacre_listener_held_bytes", "Bytes that no application has asked for.", ("listener",), held)
        yield by_label("lacre_listener_cut_connections", "Connections cut to make room for others.", ("listener",), cut)
        yield by_label("lacre_listener_unreadable", "Requests that cannot be read.", ("listener", "status"), refused)

    def pools(self) -> dict[str, dict[str, tuple[Capacity, int | None]]]:
        """Each pool of the manifest, by region: its live workers, and how many requests wait, as of the last `refresh`."""
        found: dict[str, dict[str, tuple[Capacity, int | None]]] = {}
        for (pool, region), at in self._places().items():
            found.setdefault(pool, {})[region] = at, self._waiting(pool, region)
        return found

    def _waiting(self, pool: str, region: str) -> int | None:
        queue = self._queues.get((pool, region))
        return None if queue is None else queue.requests

    def _families(self) -> Iterator[Metric]:
        present = self._places()
        backlog = {at: queue.requests for at, queue in self._queues.items() if at in present}
        workers: Labelled = {at: seen.workers for at, seen in present.items()}
        slots: Labelled = {(*at, state): getattr(seen, state) for at, seen in present.items() for state in ("busy", "free")}
        queued: Labelled = {at: count for at, count in backlog.items()}  # noqa: C416  # a mapping's keys are invariant
        away = frozenset[str]() if self._gateway.fabric is None else self._gateway.fabric.away()
        cut_off: Labelled = {(pool,): pool in away for pool in dict.fromkeys(pool for pool, _ in present)}
        without: Labelled = {(pool,): pool in self._gateway.queues.lost for (pool,) in cut_off}
        demand: Labelled = {at: count + present[at].busy for at, count in backlog.items()}
        labels = ("pool", "region")
        yield by_label("lacre_pool_away", "Whether the pool's answers cannot reach this gateway now.", ("pool",), cut_off)
        yield by_label("lacre_queue_missing", "Whether NATS has no queue for the pool.", ("pool",), without)
        yield by_label("lacre_workers", "Live workers, by their presence.", labels, workers)
        yield by_label("lacre_worker_slots", "Their slots, by their presence.", (*labels, "state"), slots)
        yield by_label("lacre_queue_requests", "Requests that no worker has taken yet.", labels, queued)
        yield by_label("lacre_pool_demand", "Backlog and busy slots: what to scale workers by.", labels, demand)
        yield from self._by_model(present)

    def _by_model(self, present: Collection[tuple[str, str]]) -> Iterator[Metric]:
        """Of the manifest's models alone: a worker chooses the names in its presence."""
        pools = self._gateway.feed.manifest.pools if self._gateway.feed.ready else {}
        said = {} if self._gateway.fabric is None else self._gateway.fabric.counts()
        known = {at: counts for at, counts in said.items() if at[0] in pools and at[2] in pools[at[0]].models}
        queues = {at: queue for at, queue in self._queues.items() if at in present}
        yield from model_metrics.families(known, queues)
