"""The `Engine` of the worker's process: passes everything on to a child, and starts another when one ends.

Rules:
- A restarted child must have the same model file and the same limits: clients were told their digest.
- One thread per engine starts its children and reads from them. It waits for nothing else, so a child never waits for it.
- What can be decided here is decided here: checks of tasks, and the text that tokens release. So `submit` and `cancel` return
  at once.
- A child that ended is replaced at once: its requests are lost, not the worker. If the next one lives less than a second, or
  cannot load, a delay follows that doubles. After a crash the delay stays short: the next request may be harmless.
- A child gets the keys of its own model's files, each as often as a file has it. The worker reads which ones those are.
- A child whose step does not end is ended. The requests in it could never end otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.runtime import tasks
from lacre.wire.wiping import overwrite
from lacre_backend.engine.adapted import AdaptedEngine, adapted_name
from lacre_backend.engine.delivery import Outbox, TaskEvents
from lacre_backend.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineLost,
    Event,
    Finish,
    Grammar,
    ModelInfo,
    ReadImage,
    Task,
    TaskRefused,
    check,
)
from lacre_backend.engine.shards import check_name
from lacre_backend.engine.vocabulary import Vocabulary
from lacre_backend.engine.watch import STUCK
from lacre_backend.engine_process.link import EngineLink
from lacre_backend.engine_process.messages import (
    Answered,
    Cancel,
    Close,
    Compile,
    Failed,
    FromChild,
    HeldGrammar,
    HeldImage,
    Load,
    ModelKey,
    OwnText,
    Picture,
    Pulse,
    Ready,
    Speak,
    Submit,
    TaskEvent,
    Unanswered,
    Unloadable,
    UserTexts,
    WantKey,
    raised,
    told,
)
from lacre_backend.models.chunked import SealedModelInvalid
from lacre_backend.models.sealed import read_head
from lacre_backend.settings import ModelSettings
from lacre_fabric.keys.kms import PLAIN, EncryptionContext, Kms, connect

CLOSE_LIMIT: Final = 35.0  # seconds: for the engine's own limit, and to free its memory
AGAIN: Final = 0.5  # seconds before the third try to start a child, doubled with each further one
AGAIN_MOST: Final = 30.0
AGAIN_CRASHED: Final = 2.0  # the longest delay after a child that was ready
SETTLED: Final = 1.0  # seconds after which a ready child counts as one that works

log = structlog.get_logger("lacre.worker")


class ProcessEngine:
    """An `Engine` whose work a child does. slots: as the child's engine. adapted: as `LlamaEngine`."""

    def __init__(self, settings: ModelSettings, kms: str = PLAIN) -> None:
        """Loads the model. kms: the address of the service that opens sealed models. Raises as `load_engine`."""
        files = (settings.path, settings.draft_model, settings.projector, *settings.adapters.values())
        self._files = [path for path in files if path is not None]
        for path in (*self._files, *settings.signers):
            check_name(path)
        self._settings = settings.model_dump_json()
        self._kms = kms
        self._lock = threading.Lock()  # for the fields below
        self._link: EngineLink | None = None  # to a child that is ready
        self._starting: EngineLink | None = None
        self._streams: dict[str, TaskEvents] = {}
        self._spoken: list[int] = []
        self._closed = False
        self._closing = threading.Event()
        self._outbox = Outbox()  # the reading thread's
        self._stuck = False
        self.fault: str | None = None  # why there is no child now
        self._first: Future[Ready] = Future()
        label = settings.name or (settings.path.stem if settings.path is not None else "default")
        self._thread = tasks.thread(f"engine {label}", self._keep)
        try:
            self._ready = self._first.result()
        except BaseException:
            self.close()
            raise
        self._vocabulary = Vocabulary(self._ready.pieces, self._ready.ends)
        self.slots = self._ready.slots
        self.model: ModelInfo = replace(self._ready.info, images=_Pictures(self) if self._ready.sees else None)
        name = self.model.name
        self.adapted = [
            AdaptedEngine(self, adapter, digest, adapted_name(name, adapter)) for adapter, digest in self._ready.adapters
        ]

    @property
    def died(self) -> bool:
        return self._thread.died is not None

    @property
    def stuck(self) -> bool:
        return self._stuck

    @property
    def pid(self) -> int | None:
        """The id of the process that computes; None while there is none."""
        link = self._link
        return None if link is None else link.pid

    def submit(self, task: Task) -> AsyncIterator[Event]:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        """What only the child can refuse, such as different prompts in one group, the iterators raise."""
        for task in tasks:
            check(task, self.model)
            if task.adapter is not None and all(task.adapter != name for name, _ in self._ready.adapters):
                raise TaskRefused("The engine has no such adapter.", field="adapter")
        link = self._up()
        sent = tuple(self._sendable(task, link) for task in tasks)
        streams = {task.id: TaskEvents.here() for task in tasks}
        with self._lock:
            if len(streams) < len(tasks) or not self._streams.keys().isdisjoint(streams):
                raise TaskRefused("An unfinished task has this id.", field="id")
            if self._link is not link:
                raise EngineLost(begun=False)
            self._streams |= streams
        try:
            link.send(Submit.of(sent))
        except LacreError:
            with self._lock:
                for name in streams:
                    self._streams.pop(name, None)
            raise
        return [*streams.values()]

    def cancel(self, task_id: str) -> None:
        link = self._link
        if link is None or task_id not in self._streams:
            return
        try:
            link.send(Cancel(task_id))
        except (EngineLost, EngineError):
            return  # its stream ends with the child

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        link = self._up()
        (ids,) = link.wait(link.ask(lambda number: OwnText(number, text, special))).ids
        return list(ids)

    def speak(self, tokens: Sequence[int]) -> None:
        spoken = self._vocabulary.speak(tokens, self.model.control_tokens)
        self.model = replace(self.model, spoken_ids=self.model.spoken_ids.union(spoken))
        with self._lock:
            self._spoken += tokens
            link = self._link
        if link is not None:  # the next child hears it when it is ready
            link.send(Speak(tuple(tokens)))

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        return self._vocabulary.released(tokens, stop)

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not any(texts):
            return [[] for _ in texts]
        asked = self._up().ask(lambda number: UserTexts(number, tuple(texts)))
        return [list(ids) for ids in (await asyncio.wrap_future(asked)).ids]

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        link = self._up()
        return _compiled(link, source, begun)

    async def picture(self, data: bytes) -> ReadImage:
        """As `ImageReader.read`."""
        link = self._up()
        asked = link.obtain(lambda number: Picture(number, data), lambda answer: HeldImage(answer.number, answer.tokens))
        return await asyncio.wrap_future(asked)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            link, starting = self._link, self._starting
        self._closing.set()
        if link is not None:
            try:
                link.send(Close())
            except LacreError:
                link.kill()
        if starting is not None:
            starting.kill()
        if not self._thread.join(CLOSE_LIMIT) and link is not None:
            link.kill()
            self._thread.join(CLOSE_LIMIT)

    def _up(self) -> EngineLink:
        """Raises EngineError if it is closed, and EngineLost if there is no child now."""
        if self._closed:
            raise EngineClosed("The engine is closed.")
        if (link := self._link) is None:
            raise EngineLost(begun=False)
        return link

    def _sendable(self, task: Task, link: EngineLink) -> Task:
        """The task with what the child keeps, by number. Raises TaskRefused."""
        grammar = task.sampling.grammar
        if isinstance(grammar, str):
            grammar = _compiled(link, grammar, task.begun)
            task = replace(task, sampling=replace(task.sampling, grammar=grammar))
        elif grammar is not None and not (isinstance(grammar, HeldGrammar) and grammar.begun == task.begun):
            raise TaskRefused("The grammar was made by another engine, or for another beginning.", field="grammar")
        held = [each for each in (grammar, *(placed.image for placed in task.images)) if each is not None]
        if not all(isinstance(each, HeldGrammar | HeldImage) and link.holds(each.number, each) for each in held):
            raise EngineLost(begun=False)  # made by a child that has ended, or by another engine
        return task

    # The reading thread

    def _keep(self) -> None:
        """Starts one child after the other, until the engine is closed."""
        delay, tries = 0.0, 0
        while not self._closing.wait(delay):
            settled, most = False, AGAIN_MOST
            try:
                with self._started() as (link, ready):
                    began, most = time.monotonic(), AGAIN_CRASHED
                    if not self._first.done():
                        self._first.set_result(ready)
                    self._serve(link)
                    settled = time.monotonic() - began > SETTLED
            except Exception as error:
                if not self._first.done():
                    self._first.set_exception(error)
                    return
                if not isinstance(error, LacreError | OSError):
                    raise  # a fault of the worker's own, which ends it
                self._fail(f"it cannot be started: {error}")
            tries = 0 if settled else tries + 1
            delay = 0.0 if tries < 2 else min(AGAIN * 2.0 ** min(tries - 2, 10), most)

    @contextmanager
    def _started(self) -> Iterator[tuple[EngineLink, Ready]]:
        """A child that is ready. At the end of the block it has ended, and so has all that waited for it."""
        link, ended = EngineLink(), ""
        with self._lock:
            self._starting = link
        try:
            if self._closed:
                raise EngineClosed("The engine is closed.")
            ready = self._load(link)
            self._check_same(ready)
            with self._lock:  # no task may come before what it speaks
                if self._spoken:
                    link.send(Speak(tuple(self._spoken)))
                self._link, self._starting, self.fault = link, None, None
            yield link, ready
        finally:
            with self._lock:
                self._link = self._starting = None
            self.fault = self.fault or "it has ended"
            self._lose()
            ended = link.end()
        if not self._closed:
            self._fail(f"it ended with {ended}")

    def _load(self, link: EngineLink) -> Ready:
        """Raises what the child's loading raised, and SettingsError if the child ended in it."""
        service, due = connect(self._kms), keys_due(self._files)
        try:
            link.send(Load(self._settings, "" if service is None else service.scheme))
            for message in link.incoming:
                match message:
                    case None:
                        pass
                    case WantKey():
                        _give_key(link, service, message, due)
                    case Ready():
                        return message
                    case Unloadable():
                        raise raised(message.failure)
                    case _:
                        raise InvalidMessage(f"an engine's process said {type(message).__name__} before it was ready")
        except BaseException:
            link.kill()
            raise
        finally:
            if service is not None:
                service.close()
        raise SettingsError(
            f"llama.cpp ended its process with {link.end()} while the model was loaded. Check the model file, and this host's "
            "memory: `lacre model inspect` says how much it needs."
        )

    def _check_same(self, ready: Ready) -> None:
        """Raises SettingsError if a restarted child has another model than the first."""
        if not self._first.done():
            return
        first = self._first.result()
        if replace(ready.info, created=0) != replace(first.info, created=0) or ready.slots != first.slots:
            raise SettingsError("the model's file or its limits have changed since the worker was started. Restart the worker.")

    def _serve(self, link: EngineLink) -> None:
        """Passes on what the child says, until it ends."""
        heard = time.monotonic()
        try:
            for message in link.incoming:
                if message is not None:
                    heard = time.monotonic()
                    self._take(link, message)
                    continue
                self._outbox.flush()
                self._stuck = self._stuck or time.monotonic() - heard > STUCK
                if self._stuck:
                    log.error("engine.stuck", model=self._first.result().info.name)
                    link.kill()
        except InvalidMessage as error:
            log.error("engine.invalid", model=self._first.result().info.name, reason=str(error))
            link.kill()

    def _take(self, link: EngineLink, message: FromChild) -> None:
        match message:
            case TaskEvent():
                self._post(message.task, message.event, last=isinstance(message.event, Finish))
            case Failed():
                self._post(message.task, raised(message.failure), last=True)
            case Answered() | Unanswered():
                link.answer(message)
            case Pulse():
                self._stuck = message.stuck
            case _:
                raise InvalidMessage(f"an engine's process said {type(message).__name__} after it was ready")

    def _post(self, task: str, event: Event | LacreError, *, last: bool) -> None:
        with self._lock:
            stream = self._streams.pop(task, None) if last else self._streams.get(task)
        if stream is None:
            return
        self._outbox.post(stream, event)
        if stream.abandoned:
            self.cancel(task)

    def _lose(self) -> None:
        """Ends every stream of a child that has ended."""
        with self._lock:
            streams, self._streams = self._streams, {}
        self._stuck = False
        for stream in streams.values():
            self._outbox.post(stream, EngineClosed("The engine is closed.") if self._closed else EngineLost(begun=True))
        self._outbox.flush()

    def _fail(self, why: str) -> None:
        """Says why there is no child, once for each reason."""
        if self._closed or not self._first.done() or self._first.exception() is not None:
            return
        if why != self.fault:
            log.error("engine.ended", model=self._first.result().info.name, reason=why)
        self.fault = why


class _Pictures:
    """An `ImageReader`: the child reads."""

    def __init__(self, engine: ProcessEngine) -> None:
        self._engine = engine

    async def read(self, data: bytes) -> ReadImage:
        return await self._engine.picture(data)

    def close(self) -> None:
        """The child closes its own."""


def _compiled(link: EngineLink, source: str, begun: tuple[int, ...]) -> HeldGrammar:
    return link.wait(
        link.obtain(lambda number: Compile(number, source, begun), lambda answer: HeldGrammar(answer.number, begun))
    )


def keys_due(files: Sequence[Path]) -> Counter[tuple[bytes, str]]:
    """The wrapped keys and digests in the heads of sealed files: once for each file, as loading asks for them."""
    due: Counter[tuple[bytes, str]] = Counter()
    for path in files:
        try:
            head = read_head(path)
        except (SealedModelInvalid, OSError):  # a plain file, or one that the child refuses with its reason
            continue
        due[head.wrapped, head.about.digest] += 1
    return due


def _give_key(link: EngineLink, service: Kms | None, asked: WantKey, due: Counter[tuple[bytes, str]]) -> None:
    """Unwraps the key of one of the model's own files, and of nothing else. A file may have taken over the child: then it must
    not open the other models of this worker's credentials. due: keys that may still be asked for.
    """
    if service is None:
        raise InvalidMessage("an engine's process asks for a key, and there is no service")
    if due[asked.wrapped, asked.digest] <= 0:
        raise InvalidMessage(
            "an engine's process asks for a key that its model's files do not have, or for one twice. If they were replaced "
            "just now, start the worker again; if not, check where they come from"
        )
    due[asked.wrapped, asked.digest] -= 1
    try:
        key = service.unwrap(asked.wrapped, EncryptionContext("model", "", digest=asked.digest))
    except LacreError as error:
        link.send(ModelKey(None, told(error)))
        return
    copy = bytes(key)
    try:
        link.send(ModelKey(copy), secret=True)
    finally:
        overwrite(key)
        overwrite(copy)
