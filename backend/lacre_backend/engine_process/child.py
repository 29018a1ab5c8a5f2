"""The process of an engine: `python -m lacre_backend.engine_process.child SOCKET PARENT`. `link` starts it.

Rules:
- It reads messages in its event loop, and passes them to the engine. The engine's own thread writes its events to the socket:
  no other thread stands between a token and the worker.
- All slow work runs beside the loop: tokenizing, compiling grammars, reading pictures.
- It writes no core dump, no other process may trace it, and it logs as the worker does: no content.
- A request that fails ends alone, also if no one foresaw how.
- It ends when the socket closes, and the kernel ends it with the thread that started it. Signals are the worker's affair.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import structlog
import uvloop

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.runtime import tasks
from lacre.wire.wiping import overwrite
from lacre_backend.engine.delivery import Delivered
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import EngineError, Grammar, PlacedImage, ReadImage, Task, TaskRefused
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.engine_process.messages import (
    TO_CHILD,
    Answered,
    Cancel,
    Close,
    Compile,
    Failed,
    Forget,
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
    ToChild,
    Unanswered,
    Unframer,
    Unloadable,
    UserTexts,
    WantKey,
    framed,
    raised,
    told,
)
from lacre_backend.settings import ModelSettings
from lacre_fabric import logs
from lacre_fabric.keys.kms import EncryptionContext

PULSE: Final = 1.0  # seconds
_PIECE: Final = 2**18  # bytes read at a time
_FAILED: Final = "The engine failed at this request. Try again, or with another request."
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4

log = structlog.get_logger("lacre.worker")


class Pipe:
    """The socket to the worker. Any thread may send. A `Road` to the streams of the worker."""

    def __init__(self, file: int) -> None:
        self.socket = socket.socket(fileno=file)
        self.socket.setblocking(False)
        self._lock = threading.Lock()
        self._unframer = Unframer(TO_CHILD, secret=True)

    def send(self, *messages: FromChild) -> None:
        """Waits until the worker takes them; it always reads. Does nothing if the worker has gone."""
        data = memoryview(b"".join(map(framed, messages)))
        with self._lock:
            while data:
                try:
                    data = data[self.socket.send(data) :]
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(self.socket, select.POLLOUT)
                    poll.poll()
                except OSError:
                    return

    def deliver(self, batch: Sequence[Delivered]) -> None:
        self.send(*(_said(stream, event) for stream, event in batch))

    def wait(self) -> ToChild:
        """The next message. Blocks, while the model loads. Ends the process if the worker has gone."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while True:
            poll.poll()
            data = self.socket.recv(_PIECE)
            found = self.parsed(data)
            overwrite(data)  # it may have a key, and the unframer has its own
            if found:
                return found[0]  # the worker asks nothing before the model is loaded, and sends one answer at a time

    def loaded(self) -> None:
        """No further key comes."""
        self._unframer.secret = False

    async def read(self) -> list[ToChild]:
        return self.parsed(await asyncio.get_running_loop().sock_recv(self.socket, _PIECE))

    def parsed(self, data: bytes) -> list[ToChild]:
        if not data:
            os._exit(0)  # the worker has ended: there is nobody to tell, and nothing to keep
        return self._unframer.feed(data)


class NamedStream:
    """A `TaskStream` of a task by its name."""

    def __init__(self, name: str, pipe: Pipe) -> None:
        self.name = name
        self.road = pipe
        self.abandoned = False


def _said(stream: Any, event: Any) -> FromChild:
    return Failed(stream.name, told(event)) if isinstance(event, LacreError) else TaskEvent(stream.name, event)


class KeysOfWorker:
    """A `Kms` that asks the worker, which has the credentials. It unwraps the keys of models alone."""

    binds = True

    def __init__(self, scheme: str, pipe: Pipe) -> None:
        self.scheme = scheme
        self._pipe = pipe

    def wrap(self, data_key: bytes | bytearray, context: EncryptionContext) -> bytes:  # noqa: ARG002 - it seals nothing
        raise SettingsError("the process of an engine wraps no keys")

    def unwrap(self, wrapped: bytes, context: EncryptionContext) -> bytearray:
        self._pipe.send(WantKey(wrapped, context.digest))
        answer = self._pipe.wait()
        if not isinstance(answer, ModelKey):
            raise InvalidMessage("the worker answered something else than a key")
        if answer.key is None:
            raise SettingsError("the worker has no key") if answer.failure is None else raised(answer.failure)
        key = bytearray(answer.key)
        overwrite(answer.key)
        return key

    def close(self) -> None:
        """The worker closes the service."""


class EngineChild:
    """The engine, and what the worker refers to by number."""

    def __init__(self, engine: LlamaEngine | LlamaEmbedder, pipe: Pipe) -> None:
        self._engine = engine
        self._pipe = pipe
        self._held: dict[int, Grammar | ReadImage] = {}
        self._asked: dict[int, asyncio.Task[object]] = {}

    async def serve(self) -> None:
        """Until the worker closes it."""
        while True:
            for message in await self._pipe.read():
                if isinstance(message, Close):
                    return
                self._take(message)

    def _take(self, message: ToChild) -> None:
        match message:
            case Submit():
                self._submit(message.whole())
            case Cancel():
                self._ending([NamedStream(message.task, self._pipe)], partial(self._engine.cancel, message.task))
            case Speak():
                self._ending((), partial(self._engine.speak, message.tokens))
            case OwnText():
                words = partial(self._engine.tokenize, message.text, message.special)
                self._answer(message.number, asyncio.to_thread(words), lambda ids: ((tuple(ids),), 0))
            case UserTexts():
                self._answer(message.number, self._engine.tokens(message.texts), lambda ids: (tuple(map(tuple, ids)), 0))
            case Compile():
                compiled = asyncio.to_thread(self._engine.grammar, message.source, message.begun)
                self._answer(message.number, compiled, partial(self._keep, message.number))
            case Picture():
                self._answer(message.number, self._read(message.data), partial(self._keep, message.number))
            case Forget():
                for number in message.numbers:
                    self._held.pop(number, None)
                    if (asked := self._asked.get(number)) is not None:
                        asked.cancel()
            case _:
                raise InvalidMessage(f"the worker sent a {type(message).__name__} to a loaded engine")

    def _submit(self, submitted: Sequence[Task]) -> None:
        streams = [NamedStream(task.id, self._pipe) for task in submitted]
        self._ending(streams, lambda: self._engine.submit_to([self._with_held(task) for task in submitted], streams))

    def _ending(self, streams: Sequence[NamedStream], act: Callable[[], None]) -> None:
        """Does what the worker asks. Any failure of it ends these streams, and no others."""
        try:
            act()
        except LacreError as error:
            self._pipe.deliver([(stream, error) for stream in streams])
        except Exception as error:  # noqa: BLE001 - the answers beside it must not end with this request
            log.error("engine.request_failed", model=self._engine.model.name, **logs.places(error))
            self._pipe.deliver([(stream, EngineError(_FAILED)) for stream in streams])

    def _with_held(self, task: Task) -> Task:
        """The task with the grammar and the pictures that its numbers stand for. Raises TaskRefused."""
        grammar = task.sampling.grammar
        if isinstance(grammar, HeldGrammar):
            task = replace(task, sampling=replace(task.sampling, grammar=self._known(grammar.number)))
        if not task.images:
            return task
        return replace(task, images=tuple(PlacedImage(each.at, self._image(each.image)) for each in task.images))

    def _known(self, number: int) -> Any:
        if number not in self._held:
            raise TaskRefused("The grammar or picture was read by another engine.", field="grammar")
        return self._held[number]

    def _image(self, image: ReadImage) -> ReadImage:
        found: ReadImage = self._known(image.number) if isinstance(image, HeldImage) else image
        return found

    async def _read(self, data: bytes) -> ReadImage:
        images = self._engine.model.images
        if images is None:
            raise TaskRefused("This model reads no images.", field="images")
        return await images.read(data)

    def _keep(self, number: int, held: Any) -> tuple[tuple[tuple[int, ...], ...], int]:
        self._held[number] = held
        return (), getattr(held, "tokens", 0)

    def _answer(self, number: int, work: Awaitable[Any], answered: Callable[[Any], tuple[Any, int]]) -> None:
        """Works on a question beside the loop."""

        async def answer() -> None:
            try:
                self._pipe.send(Answered(number, *answered(await work)))
            except LacreError as error:
                self._pipe.send(Unanswered(number, told(error)))
            except Exception:
                self._pipe.send(Unanswered(number, told(EngineError(_FAILED))))
                raise
            finally:
                self._asked.pop(number, None)

        self._asked[number] = tasks.detach("question", answer())


async def _pulse(engine: LlamaEngine | LlamaEmbedder, pipe: Pipe) -> None:
    while True:
        pipe.send(Pulse(engine.stuck))
        await asyncio.sleep(PULSE)


async def _serve(file: int) -> None:
    pipe = Pipe(file)
    engine = _loaded(pipe)
    if engine is None:
        return
    pulse = tasks.start("pulse", partial(_pulse, engine, pipe))
    pipe.loaded()
    try:
        await EngineChild(engine, pipe).serve()
    finally:
        await pulse.close()
        await asyncio.to_thread(engine.close)
        _tell(engine)


def _loaded(pipe: Pipe) -> LlamaEngine | LlamaEmbedder | None:
    """Loads the model that the first message names, and tells the worker."""
    try:
        asked = pipe.wait()
        if not isinstance(asked, Load):
            raise InvalidMessage("the worker asked for no model")
        service = KeysOfWorker(asked.scheme, pipe) if asked.scheme else None
        engine = load_engine(ModelSettings.model_validate_json(asked.settings), service=service)
    except LacreError as error:
        pipe.send(Unloadable(told(error)))
        return None
    except OSError as error:
        named = "" if error.filename is None else f"{error.filename}: "
        reason = SettingsError(f"{named}{error.strerror or type(error).__name__}. Check the path, and its permissions.")
        pipe.send(Unloadable(told(reason)))
        return None
    except MemoryError:
        reason = SettingsError("There is too little memory for this model. Stop other programs, or use a larger machine.")
        pipe.send(Unloadable(told(reason)))
        return None
    adapters = tuple((each.adapter, each.digest) for each in engine.adapted) if isinstance(engine, LlamaEngine) else ()
    pieces, ends = engine.vocabulary.pieces, engine.vocabulary.ends
    info, sees = replace(engine.model, images=None), engine.model.images is not None
    pipe.send(Ready(info, tuple(pieces), tuple(sorted(ends)), engine.slots, adapters, sees))
    return engine


def _tell(engine: LlamaEngine | LlamaEmbedder) -> None:
    """Logs what the engine's guesses and its copies of idle caches were worth."""
    if not isinstance(engine, LlamaEngine):
        return
    if engine.speculation is not None:
        counts = engine.speculation.counts
        log.info("worker.speculation", model=engine.model.name, number=counts.guessed, accepted=counts.accepted)
    if (copies := engine.idle_caches).saved:
        log.info("worker.idle_caches", model=engine.model.name, number=copies.saved, accepted=copies.restored)


def _alone(parent: int) -> None:
    """Ends with its parent; is not traced or dumped; leaves signals to the worker, which drains."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(0)


def main(file: int, parent: int) -> None:
    _alone(parent)
    logs.configure(sys.stderr)
    with logs.last_words(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(tasks.run(_serve(file)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
