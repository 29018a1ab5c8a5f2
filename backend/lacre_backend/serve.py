"""The worker process: loads the models, joins the fabric, runs the node until SIGTERM, then drains."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from lacre.errors import SettingsError
from lacre.jose.jws import raw_public_key
from lacre.runtime import tasks, watched_files
from lacre_backend import health
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_backend.app_thread import Elsewhere
from lacre_backend.engine.adapted import AdaptedEngine, adapted_name
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.keyring import KeyRing
from lacre_backend.node.claims_probe import ClaimsProbe
from lacre_backend.node.node import Identity, Node
from lacre_backend.node.ordered_drain import OrderedDrain
from lacre_backend.node.readiness import Holding, Part, Readiness, Reason, alive
from lacre_backend.node.work_counts import WorkCounts
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_backend.upstream import app as upstream
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_fabric import logs
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms.wrapping import Keeping, keeping
from lacre_fabric.nats.manifest_feed import ManifestFeed, memory_in
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.model_names import DEFAULT_MODEL, from_file, is_name
from lacre_fabric.work.presence import accepts_grants_of
from lacre_fabric.work.slots import shares

log = structlog.get_logger("lacre.worker")


async def serve(settings: WorkerSettings) -> None:
    """Raises SettingsError, KmsError or FabricUnavailable if it cannot start, and TaskDied if a part of it died."""
    logs.configure(sys.stderr)
    await tasks.run(_serve(settings))


async def _serve(settings: WorkerSettings) -> None:
    async with AsyncExitStack() as stack:
        kept = stack.enter_context(keeping(settings.kms, settings.pool))
        keys, receipt_key = KeyRing(settings.keys, kept), pool_keys.read_receipt_key(settings.receipt_key, kept)
        stack.callback(keys.close)
        credential = Credential.load(settings.nats.credentials)
        serving = served(settings, stack)
        await keys.look()  # loading a model takes time; the first presence must announce current keys
        claims: list[Part] = []  # set once there is a connection, and likewise the feed
        feeds: list[ManifestFeed] = []

        def accepting() -> list[str]:
            return [accepts_grants_of(key) for feed in feeds if feed.known for key in feed.manifest.gateway_keys]

        ordered = OrderedDrain(lambda: feeds[0].manifest, settings.pool, settings.nats.region, settings.node)
        readiness = Readiness(
            partial(_holding, settings.pool, serving, keys, raw_public_key(receipt_key)),
            [*serving.parts, lambda: claims[0]() if claims else None, ordered.reason],
        )
        counts = WorkCounts()
        fabric = await NatsWorker.connect(
            settings.nats.servers,
            credential,
            settings.pool,
            settings.node,
            serving.names,
            slots=serving.slots,
            each=serving.each,
            sharing=serving.sharing,
            keys=lambda: (*keys.fingerprints(), *accepting()),
            able=readiness,
            region=settings.nats.region,
            counts=counts.now,
        )
        stack.push_async_callback(fabric.close)
        feed = ManifestFeed(fabric.connection.manifest, settings.root, memory=memory_in(settings.memory))
        feeds.append(feed)
        await feed.start()
        stack.push_async_callback(feed.close)
        probe = ClaimsProbe(fabric.try_claim)
        claims.append(probe.reason)
        await tasks.together(probe.look(), *(watched.look() for watched in serving.watched))
        readiness.follow(feed)
        fabric.on_order = ordered.obey
        identity = Identity(
            settings.pool,
            lambda: keys.keys,
            receipt_key,
            lambda: feed.manifest,
            look_for_keys=_looking(keys, kept),
            receipt_keys=lambda: keys.receipt_keys,
            catch_up=feed.catch_up,
        )
        node = Node(fabric, serving.app, identity, repeatable=serving.repeatable, weighs=serving.weighs, counts=counts)
        running = tasks.start("node", node.run)
        works: list[tuple[str, tasks.Work]] = [
            ("pool keys", keys.watch),
            ("claims", probe.watch),
            ("readiness", readiness.watch),
            ("certificates", partial(watched_files.watch, lambda: [fabric.connection.trust])),
        ]
        works += [("upstream", watched.watch) for watched in serving.watched]
        if settings.health is not None:
            report = partial(_report, fabric, readiness, running, serving.watched)
            works.append(("health", partial(health.tell, settings.health, report)))
        for name, work in works:
            stack.push_async_callback(tasks.start(name, work).close)
        await fabric.announce()
        await _signalled()
        await fabric.drain()  # first: it returns work that arrives just now, which an aborted pull would lose
        await running.close()
        await node.drain(settings.drain)


def _holding(pool: str, serving: ServedApp, keys: KeyRing, receipt_key: bytes) -> Holding:
    held = frozenset(keys.fingerprints())
    return Holding(pool, tuple(serving.names), held, receipt_key, serving.digests, keys.receipts())


def _report(fabric: NatsWorker, readiness: Readiness, running: tasks.Background, watched: Sequence[Probe]) -> str:
    """The content of the health file: the state, then a line for each server of an upstream."""
    return "\n".join([_state(fabric, readiness, running), *(line for probe in watched for line in probe.lines())])


def _state(fabric: NatsWorker, readiness: Readiness, running: tasks.Background) -> str:
    """The first line of the health file: that this worker takes work, or why it does not."""
    if not running.alive:
        return "draining"
    if not fabric.connection.connected:
        return "not connected to the NATS server"
    return health.READY if readiness.models() else "; ".join(reason.detail for reason in readiness.reasons())


@dataclass(frozen=True, slots=True)
class ServedApp:
    """The app with its model names, its parallel sequences, and the actions that it may start before their claim.

    each: slots by model. sharing: adapters with their base, whose slots they use. digests: of the files of models and adapters.
    weighs: actions for which the app reports the number of sequences. parts: report whether it can work. watched: background
    checks for that.
    """

    app: Elsewhere
    names: list[str]
    slots: int
    repeatable: frozenset[str]
    parts: tuple[Part, ...]
    watched: tuple[Probe, ...] = ()
    each: Mapping[str, int] = field(default_factory=dict)
    sharing: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    weighs: frozenset[str] = frozenset()


def served(settings: WorkerSettings, stack: AsyncExitStack) -> ServedApp:
    """The app and its parts, closed with `stack`. Raises SettingsError."""
    if settings.upstream is not None:
        origins = Origins(settings.upstream)
        app, probe = Elsewhere(upstream.create_app(settings.upstream, origins), "upstream"), Probe(settings.upstream, origins)
        stack.callback(app.close)
        stack.push_async_callback(probe.close)
        names = [model.name for model in settings.upstream.models]
        parts = (alive(app), probe.reason)
        # Another program's actions must never run twice.
        return ServedApp(app, names, settings.forwarded, frozenset(), parts, (probe,))
    _check_names(settings.models)
    engines: list[ProcessEngine] = []
    for model in settings.models:
        engines.append(ProcessEngine(model, settings.kms))
        stack.callback(engines[-1].close)
    adapted = {engine.model.name: engine.adapted for engine in engines}
    every: list[ProcessEngine | AdaptedEngine] = [*engines, *itertools.chain(*adapted.values())]
    app = Elsewhere(create_app(every), "api")
    stack.callback(app.close)
    own = {engine.model.name: engine.slots for engine in engines}
    sharing = {one.model.name: base for base, ones in adapted.items() for one in ones}
    slots = settings.slots or sum(own.values())
    absent = [partial(_absent, engine, name) for engine in engines for name in _names(engine)]
    reports: tuple[Part, ...] = (alive(app), alive(*engines), *absent)
    names, each = [*own, *sharing], shares(slots, own)
    digests = {engine.model.name: engine.model.digest for engine in every}
    return ServedApp(app, names, slots, REPEATABLE, reports, each=each, sharing=sharing, digests=digests, weighs=WEIGHED)


def _names(engine: ProcessEngine) -> list[str]:
    return [engine.model.name, *(adapted.model.name for adapted in engine.adapted)]


def _absent(engine: ProcessEngine, model: str) -> Reason | None:
    """Why nothing computes for this model now."""
    if (fault := engine.fault) is None:
        return None
    remedy = "wait for its restart; if it ends again and again, update llama.cpp, or check the model file and the host's memory"
    return Reason("engine", f"the process of the engine of {engine.model.name} is away: {fault}", remedy, model)


def _check_names(models: Sequence[ModelSettings]) -> None:
    """Raises SettingsError if two models or adapters share an id: a caller could get either."""
    known: dict[str, Path | None] = {}
    for model in models:
        base = model.name or (DEFAULT_MODEL if model.path is None else from_file(model.path))
        ids = {base: model.path} | {adapted_name(base, adapter): path for adapter, path in model.adapters.items()}
        for name, path in ids.items():
            if not is_name(name):
                raise SettingsError(f"models.adapters: the id {name} is too long: choose shorter names")
            if name in known:
                both = " and ".join(str(one or "the default model") for one in (known[name], path))
                raise SettingsError(f"models.name: {both} share the id {name}: set another `name` for one of them")
            known[name] = path


def _looking(keys: KeyRing, kept: Keeping) -> Callable[[], bool]:
    """What the node calls before a key id counts as unknown. With a KMS it does nothing, because waiting for it would stall
    streams.

    No client seals to a key that this worker has not announced, and `watch` loads it later.
    """
    return keys.reload if kept.kms is None else lambda: False


async def _signalled() -> None:
    """Waits for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
