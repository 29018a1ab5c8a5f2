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
from lacre_backend.engine.adapters import AdapterFile, adapted_name
from lacre_backend.engine.draft_model import DraftFile
from lacre_backend.engine.embed import LlamaEmbedder, LlamaReranker
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, ModelMetadata
from lacre_backend.engine.projector import ProjectorFile, projected_digest
from lacre_backend.engine.protocol import TaskKind
from lacre_backend.engine.speculation import Speculation
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.keyring import KeyRing
from lacre_backend.models.opening import open_model
from lacre_backend.node.claims_probe import ClaimsProbe
from lacre_backend.node.node import Identity, Node
from lacre_backend.node.readiness import Holding, Part, Readiness, alive
from lacre_backend.node.work_counts import WorkCounts
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_backend.upstream import app as upstream
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_fabric import logs
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms import PLAIN
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

        readiness = Readiness(
            partial(_holding, settings.pool, serving, keys, raw_public_key(receipt_key)),
            [*serving.parts, lambda: claims[0]() if claims else None],
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
    engines = [load_engine(model, settings.kms) for model in settings.models]
    for engine in engines:
        stack.callback(engine.close)
        if isinstance(engine, LlamaEngine) and engine.speculation is not None:
            stack.callback(_tell, engine.model.name, engine.speculation)
    adapted = {engine.model.name: engine.adapted for engine in engines if isinstance(engine, LlamaEngine)}
    every = [*engines, *itertools.chain(*adapted.values())]
    app = Elsewhere(create_app(every), "api")
    stack.callback(app.close)
    own = {engine.model.name: engine.slots for engine in engines}
    sharing = {one.model.name: base for base, ones in adapted.items() for one in ones}
    slots = settings.slots or sum(own.values())
    parts = (alive(app), alive(*engines))
    names, each = [*own, *sharing], shares(slots, own)
    digests = {engine.model.name: engine.model.digest for engine in every}
    return ServedApp(app, names, slots, REPEATABLE, parts, each=each, sharing=sharing, digests=digests, weighs=WEIGHED)


def _tell(model: str, speculation: Speculation) -> None:
    """Logs what the worker's guesses were worth, when it ends."""
    counts = speculation.counts
    log.info("worker.speculation", model=model, number=counts.guessed, accepted=counts.accepted)


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


def load_engine(model: ModelSettings, kms: str = PLAIN) -> LlamaEngine | LlamaEmbedder:
    """The engine for a model's file. kms: the address of the service that opens sealed models.

    Raises SettingsError if the file is missing, not GGUF or too large, or if its tokenizer fails its trial; or what
    `open_model` raises.
    """
    opened = open_model(model.path, model.name, model.conditions(kms))
    adapters, draft, projector = open_adapters(model, kms), open_draft(model, kms), open_projector(model, kms)
    file = opened.file
    tokenizer = Tokenizer(file.path)  # before anything here reads the vocabulary
    try:
        facts = ModelMetadata.read(file.path)
        reads = LlamaReranker if facts.ranks else LlamaEmbedder
        embeds = facts.kind is TaskKind.EMBED
        if embeds and adapters:
            raise SettingsError(f"{file.name} embeds, and adapters are for models that generate: remove `adapters`.")
        if embeds and projector is not None:
            raise SettingsError(f"{file.name} embeds, and projectors are for models that generate: remove `projector`.")
        engine = reads if embeds else partial(LlamaEngine, adapters=adapters, draft=draft, projector=projector)
        return engine(
            file.path,
            name=file.name,
            digest=projected_digest(file.digest, None if projector is None else projector.digest),
            settings=options(model),
            tokenizer=tokenizer,
            weights=opened.weights,
        )
    except BaseException:
        tokenizer.close()
        raise


def open_adapters(model: ModelSettings, kms: str) -> list[AdapterFile]:
    """The adapters of a model's table. They must meet what the model must. Raises as `open_model`."""
    opened = [(name, path, open_model(path, name, model.conditions(kms))) for name, path in model.adapters.items()]
    return [AdapterFile(name, one.file.path, one.file.digest, one.weights, path) for name, path, one in opened]


def open_draft(model: ModelSettings, kms: str) -> DraftFile | None:
    """The draft model, if one is used. It must meet what the model must. Raises as `open_model`."""
    if model.draft_model is None or model.speculation != "draft":
        return None
    opened = open_model(model.draft_model, None, model.conditions(kms))
    return DraftFile(opened.file.path, model.draft_model.name, opened.weights)


def open_projector(model: ModelSettings, kms: str) -> ProjectorFile | None:
    """The projector, if the model has one. It must meet what the model must. Raises as `open_model`."""
    if model.projector is None:
        return None
    opened = open_model(model.projector, None, model.conditions(kms))
    return ProjectorFile(opened.file.path, opened.file.digest, model.projector, opened.weights)


def options(model: ModelSettings) -> LlamaSettings:
    """A model's table as the engine's settings."""
    return LlamaSettings(
        n_ctx=model.context,
        threads=model.threads,
        slots=model.slots,
        unified=model.unified,
        cells=model.cells,
        flash=model.flash,
        kv_type=model.kv_type,
        beyond_training=model.beyond_training,
        speculation=model.speculation,
        gpu=Gpu(model.gpu_layers, model.split_mode, model.main_gpu, model.tensor_split),
    )
