"""Faults of an engine's process and of what speaks to it: each ends as little as it can."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from backend.generating import GREEDY, made, make_task
from backend.test_engine_process import PATIENCE, back, outcome, settings
from lacre.errors import InvalidMessage
from lacre_backend.engine.delivery import TaskStream
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import EngineError, EngineLost, Finish, Task, Token
from lacre_backend.engine_process import engine as room
from lacre_backend.engine_process.child import EngineChild, Pipe
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.engine_process.link import EngineLink
from lacre_backend.engine_process.messages import (
    FROM_CHILD,
    Answered,
    Cancel,
    Close,
    Failed,
    FromChild,
    HeldImage,
    Picture,
    Speak,
    Submit,
    TaskEvent,
    Unframer,
    UserTexts,
    WantKey,
    framed,
    raised,
)
from lacre_backend.models.sealed import read_head
from lacre_backend.workshop.sealing import seal_model
from lacre_fabric.keys.kms import connect
from parts.tiny_model import tiny_model
from parts.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def engine(model: Path) -> Iterator[ProcessEngine]:
    with closing(ProcessEngine(settings(model))) as made:
        yield made


class FaultyEngine(LlamaEngine):
    """A real engine with a fault in the set-up of some requests."""

    def submit_to(self, tasks: Sequence[Task], streams: Sequence[TaskStream]) -> None:
        if any(task.id.startswith("bad") for task in tasks):
            raise ValueError("canary")
        super().submit_to(tasks, streams)

    def cancel(self, task_id: str) -> None:
        if task_id.startswith("bad"):
            raise MemoryError
        super().cancel(task_id)

    def speak(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise IndexError
        super().speak(tokens)


class Worker:
    """The worker's end of a child's socket."""

    def __init__(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        self._socket = ours
        self._unframer = Unframer(FROM_CHILD)
        self.heard: list[FromChild] = []

    async def say(self, *messages: Submit | Cancel | Speak | Close) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, b"".join(map(framed, messages)))

    async def hears_the_end_of(self, task: str) -> TaskEvent | Failed:
        while True:
            for each in self.heard:
                ends = isinstance(each, Failed) or (isinstance(each, TaskEvent) and isinstance(each.event, Finish))
                if isinstance(each, Failed | TaskEvent) and ends and each.task == task:
                    return each
            self.heard += self._unframer.feed(await asyncio.get_running_loop().sock_recv(self._socket, 2**18))


async def test_a_request_whose_set_up_fails_ends_alone(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    own = LlamaSettings(n_ctx=512, slots=4, threads=1)
    with closing(FaultyEngine(model, name="tiny", digest="", settings=own)) as faulty, ours:
        pipe = Pipe(theirs.detach())
        worker, serving = Worker(ours), asyncio.create_task(EngineChild(faulty, pipe).serve())
        good, bad = make_task(faulty, max_tokens=100), make_task(faulty, max_tokens=100)
        bad = dataclasses.replace(bad, id="bad")
        await worker.say(Submit.of([good]), Submit.of([bad]), Cancel("bad cancel"), Speak(()))
        for name in ("bad", "bad cancel"):
            failed = await asyncio.wait_for(worker.hears_the_end_of(name), PATIENCE)
            assert isinstance(failed, Failed)
            assert type(raised(failed.failure)) is EngineError
            assert "canary" not in failed.failure.message
        ended = await asyncio.wait_for(worker.hears_the_end_of(good.id), PATIENCE)
        assert isinstance(ended, TaskEvent), "the answer beside it is whole"
        await worker.say(Close())
        await asyncio.wait_for(serving, PATIENCE)
        pipe.socket.close()
    said = "".join(capfd.readouterr())
    assert said.count("engine.request_failed") == 3
    assert "canary" not in said


async def test_a_signal_without_a_name_ends_a_process_as_any_other(engine: ProcessEngine) -> None:
    stream, pid = engine.submit(make_task(engine, max_tokens=400)), engine.pid
    assert pid is not None
    assert isinstance(await anext(stream), Token)
    os.kill(pid, 40)
    assert isinstance(await outcome(stream), EngineLost)
    await back(engine, pid)
    assert not engine.died
    assert len((await made(engine, max_tokens=4, sampling=GREEDY)).ids) == 4
    link = EngineLink()
    os.kill(link.pid, 40)
    assert await asyncio.to_thread(link.end) == "signal 40"


@pytest.fixture
def link() -> Iterator[EngineLink]:
    """To a child that loads nothing."""
    link = EngineLink()
    yield link
    link.kill()
    link.end()


async def test_a_picture_that_no_one_receives_is_forgotten(link: EngineLink) -> None:
    """Its caller is cancelled when the answer has come, and before the caller's coroutine runs again."""
    numbers: list[int] = []

    def question(number: int) -> Picture:
        numbers.append(number)
        return Picture(number, b"data")

    async def ask() -> None:
        await asyncio.wrap_future(link.obtain(question, lambda answer: HeldImage(answer.number, answer.tokens)))

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    link.answer(Answered(numbers[0], tokens=4))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    del asking
    gc.collect()
    assert list(link._forgotten) == numbers


def test_a_picture_in_use_is_held_and_then_forgotten(link: EngineLink) -> None:
    asked = link.obtain(lambda number: Picture(number, b"data"), lambda answer: HeldImage(answer.number, answer.tokens))
    link.answer(Answered(1, tokens=4))
    held = link.wait(asked)
    assert link.holds(1, held) and not link._forgotten
    del asked, held
    gc.collect()
    assert list(link._forgotten) == [1]


def test_work_that_is_cancelled_is_told_at_once(link: EngineLink) -> None:
    asked = link.ask(lambda number: UserTexts(number, ("a",)))
    asked.cancel()
    assert not link._forgotten, "it was sent, though the child says nothing"
    link.answer(Answered(1))


async def test_a_child_that_is_never_silent_hears_what_to_forget(engine: ProcessEngine) -> None:
    link = engine._link
    assert link is not None
    grammar = engine.grammar('start: "a"')
    del grammar
    gc.collect()
    await until(lambda: not link._forgotten, PATIENCE)


@pytest.mark.parametrize("which", ["another model's", "the same twice"])
def test_a_child_gets_its_own_models_keys_alone(tmp_path: Path, link: EngineLink, which: str) -> None:
    kms = f"file:{tmp_path / 'kms'}"
    heads = []
    for seed, name in enumerate(("own", "other")):
        plain = tiny_model(tmp_path / f"{name}.gguf", seed=seed)
        seal_model(plain, tmp_path / f"{name}.sealed", kms, lambda _what, _share: None)
        heads.append(read_head(tmp_path / f"{name}.sealed"))
    asks = [WantKey(head.wrapped, head.about.digest) for head in heads]
    service, due = connect(kms), room.keys_due([tmp_path / "own.sealed", tmp_path / "own.gguf", tmp_path / "missing"])
    assert due.total() == 1
    room._give_key(link, service, asks[0], due)
    with pytest.raises(InvalidMessage, match="asks for a key"):
        room._give_key(link, service, asks[which == "another model's"], due)
