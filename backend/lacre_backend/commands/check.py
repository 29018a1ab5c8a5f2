"""`lacre worker check`: checks everything that this worker needs, and says what to do about each fault.

It takes no work, announces nothing and loads no model. It can run beside the worker that it checks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lacre.errors import LacreError
from lacre.jose.jws import raw_public_key
from lacre_backend.engine.adapted import adapted_digest, adapted_name
from lacre_backend.engine.adapters import check
from lacre_backend.engine.draft_model import check_draft
from lacre_backend.engine.projector import check as check_projector
from lacre_backend.engine.projector import mtmd, projected_digest
from lacre_backend.engine_process.loading import open_adapters, open_draft, open_projector
from lacre_backend.keyring import KeyRing
from lacre_backend.models.opening import open_model
from lacre_backend.node.claims_probe import FAILURES, ClaimsProbe
from lacre_backend.node.readiness import Holding, Reason, against, unread
from lacre_backend.settings import WorkerSettings, load
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_backend.upstream.settings import Upstream
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms.wrapping import keeping
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.worker import try_claim


def examine(file: Path) -> list[Reason]:
    """file: the settings file. Returns the worker's faults; empty if it can serve. It never raises for a fault."""
    found: list[Reason] = []
    settings: WorkerSettings | None = None
    with _noted(found, "settings"):
        settings = load(file)
    return found if settings is None else found + asyncio.run(_examine(settings))


async def _examine(settings: WorkerSettings) -> list[Reason]:
    found: list[Reason] = []
    held = _held(settings, found)
    if settings.upstream is not None:
        with _noted(found, "upstream"):
            found += await _upstream(settings.upstream)
    with _noted(found, "fabric"):
        connection = await Connection.open(settings.nats.servers, Credential.load(settings.nats.credentials))
        try:
            found += await _on_the_fabric(settings, connection, held)
        finally:
            await connection.close()
    return found


async def _upstream(settings: Upstream) -> list[Reason]:
    """One for each server that is down, also if another one works. Raises SettingsError for a credential."""
    origins = Origins(settings)
    probe = Probe(settings, origins)
    await probe.look()
    await probe.close()
    return probe.faults()


def _held(settings: WorkerSettings, found: list[Reason]) -> Holding | None:
    """Reads the files in the settings. Returns what the worker has, if all can be read."""
    digests: dict[str, str] = {}
    names: tuple[str, ...] = tuple(model.name for model in settings.upstream.models) if settings.upstream else ()
    for model in settings.models:
        with _noted(found, "model"):
            conditions = model.conditions(settings.kms)
            opened = open_model(model.path, model.name, conditions).file
            adapters = open_adapters(model, conditions)
            for adapter in adapters:
                check(adapter.path, opened.path, adapter.source)
            if (draft := open_draft(model, conditions)) is not None:
                check_draft(draft, opened.path)
            if (projector := open_projector(model, conditions)) is not None:
                check_projector(projector, opened.path)
                mtmd()
            digest = projected_digest(opened.digest, None if projector is None else projector.digest)
            digests[opened.name] = digest
            for adapter in adapters:
                digests[adapted_name(opened.name, adapter.name)] = adapted_digest(digest, adapter.digest)
    with _noted(found, "keys"), keeping(settings.kms, settings.pool) as kept:
        ring = KeyRing(settings.keys, kept)
        keys, receipts = frozenset(ring.fingerprints()), ring.receipts()
        ring.close()
        receipt_key = raw_public_key(pool_keys.read_receipt_key(settings.receipt_key, kept))
        return Holding(settings.pool, (*names, *digests), keys, receipt_key, digests, receipts)
    return None


async def _on_the_fabric(settings: WorkerSettings, connection: Connection, held: Holding | None) -> list[Reason]:
    feed = ManifestFeed(connection.manifest, settings.root)  # without a memory: that belongs to the running worker
    await feed.catch_up()
    found = [] if feed.known else [unread(feed)]
    if feed.known and held is not None:
        found += against(feed.manifest, held, time.time())
    probe = ClaimsProbe(partial(try_claim, connection, settings.pool))
    for _ in range(FAILURES):
        await probe.look()
    return found + [reason for reason in (probe.reason(),) if reason is not None]


@contextmanager
def _noted(found: list[Reason], kind: str) -> Iterator[None]:
    try:
        yield
    except LacreError as exc:
        found.append(Reason(kind, str(exc), exc.remedy))
