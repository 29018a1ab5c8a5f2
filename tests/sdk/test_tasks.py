"""Background work: known by name, never dead in silence, and ended within a limit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from lacre.errors import NetworkError
from lacre.runtime import tasks
from lacre_fabric.logs import SafeFormatter


async def forever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise ZeroDivisionError("what " + "the text says")


async def returns() -> None:
    pass


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.01)


async def test_the_register_names_what_lives_and_closing_is_no_death(caplog: pytest.LogCaptureFixture) -> None:
    both = tasks.start("one", forever), tasks.start("two", forever)
    assert [each.name for each in tasks.alive() if each in both] == ["one", "two"]
    await asyncio.sleep(0)
    for each in both:
        await each.close()
        each.check()
    assert not set(tasks.alive()) & set(both)
    assert not caplog.records


@pytest.mark.parametrize(("work", "said"), [(returns, []), (fails, ["background work failed as it was closed: keeper"])])
async def test_work_that_ends_by_itself_when_it_is_closed_is_no_death(
    work: tasks.Work, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    closing = asyncio.Event()

    async def until_closed() -> None:
        await closing.wait()
        await work()

    background = tasks.start("keeper", until_closed)
    asyncio.get_running_loop().call_later(0.01, closing.set)
    await background.close(patience=5)
    background.check()
    assert caplog.messages == said


@pytest.mark.parametrize(("work", "cause"), [(fails, ZeroDivisionError), (returns, type(None))])
async def test_in_a_library_a_death_is_logged_and_raised_at_the_next_check(
    work: tasks.Work, cause: type, caplog: pytest.LogCaptureFixture
) -> None:
    background = tasks.start("keeper", work)
    await eventually(lambda: not background.alive)
    with pytest.raises(tasks.TaskDied, match="keeper") as raised:
        background.check()
    assert type(raised.value.__cause__) is cause
    assert caplog.messages == ["background work died: keeper"]
    await background.close()


async def test_what_it_waited_for_was_cancelled_and_not_the_work_itself() -> None:
    awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    background = tasks.start("waits", lambda: asyncio.wait_for(awaited, None))
    await asyncio.sleep(0)
    awaited.cancel()
    await eventually(lambda: not background.alive)
    with pytest.raises(tasks.TaskDied):
        background.check()


async def test_work_that_may_start_again_does_and_each_death_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    runs = iter([fails, fails, forever])

    async def twice() -> None:
        await next(runs)()

    background = tasks.start("twice", twice, restart=tasks.Restart("it holds no state", after=0.001))
    await eventually(lambda: len(caplog.messages) == 2)
    assert background.alive
    assert caplog.messages == ["background work starts again: twice"] * 2
    await background.close()


def test_a_thread_dies_by_raising_and_may_return_and_is_waited_for_within_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()
    good, bad = tasks.thread("good", told.wait), tasks.thread("bad", lambda: 1 / 0)
    assert good in tasks.alive() and not good.join(0.01)
    told.set()
    assert good.join(5) and bad.join(5)
    good.check()
    with pytest.raises(tasks.TaskDied, match="bad"):
        bad.check()
    assert sorted(caplog.messages) == ["background work died: bad", "thread does not end: good"]


async def test_end_has_a_limit_and_names_what_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue

    task = tasks.spawn("stubborn", stubborn())
    await asyncio.sleep(0)
    await tasks.end(task, limit=0.01)
    assert caplog.messages == ["task does not end: stubborn"]
    let_go.set()
    await task


async def test_end_logs_what_was_not_foreseen(caplog: pytest.LogCaptureFixture) -> None:
    async def foreseen() -> None:
        raise NetworkError("away")

    each = [tasks.spawn("bug", fails()), tasks.spawn("foreseen", foreseen()), tasks.spawn("waits", forever())]
    await asyncio.sleep(0)
    await tasks.end(*each)
    await asyncio.sleep(0)
    assert caplog.messages == ["task failed: bug"]
    tasks.detach("aside", fails())  # which fails aloud too
    await eventually(lambda: caplog.messages[1:] == ["task failed: aside"])


async def closing(order: list[str]) -> None:
    try:
        await forever()
    finally:
        order.append("closed")


async def test_together_ends_the_others_when_one_fails() -> None:
    order: list[str] = []
    with pytest.raises(ZeroDivisionError):
        await tasks.together(closing(order), fails())
    assert order == ["closed"]
    assert await tasks.together(asyncio.sleep(0, 1), asyncio.sleep(0, 2)) == [1, 2]


async def test_in_a_process_a_death_ends_the_main_coroutine_in_order() -> None:
    order: list[str] = []

    async def main() -> None:
        tasks.start("fails", fails)
        await closing(order)

    with pytest.raises(tasks.TaskDied, match="fails") as raised:
        await tasks.run(main(), grace=3600)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert order == ["closed"]


async def test_the_groups_of_two_processes_in_one_are_apart() -> None:
    """As tests run them: what dies under one `run` leaves the other alone."""
    going_on = asyncio.Event()

    async def dies() -> None:
        tasks.start("fails", fails)
        await forever()

    async def lives() -> str:
        background = tasks.start("lives", forever)
        await going_on.wait()
        await background.close()
        return "lived"

    living = tasks.spawn("living", tasks.run(lives()))
    with pytest.raises(tasks.TaskDied):
        await tasks.run(dies(), grace=3600)
    going_on.set()
    assert await living == "lived"


async def test_a_run_gives_its_result_and_its_error_and_is_cancelled_in_order() -> None:
    assert await tasks.run(asyncio.sleep(0, 7)) == 7
    with pytest.raises(ZeroDivisionError):
        await tasks.run(fails())
    order: list[str] = []
    running = tasks.spawn("run", tasks.run(closing(order)))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert order == ["closed"]


DEATHS = {
    "a task": "tasks.start('doomed', boom)",
    "a task that returns": "tasks.start('doomed', lambda: asyncio.sleep(0))",
    "a task that somebody cancelled": "tasks.start('doomed', lambda: asyncio.sleep(9)).task.cancel()",
    "a thread": "tasks.thread('doomed', lambda: 1 / 0)",
    "a task of a thread's own loop": "tasks.thread('other', lambda: asyncio.run(inner()))",
}


@pytest.mark.parametrize("hangs", [False, True], ids=["ends in order", "hangs at its end"])
@pytest.mark.parametrize("begin", DEATHS.values(), ids=DEATHS)
def test_a_process_ends_by_the_death_of_its_work(begin: str, hangs: bool) -> None:
    """Non-zero and with the traceback; by force where it does not end by itself."""
    code = f"""
import asyncio, time
from lacre.runtime import tasks
async def boom():
    1 / 0
async def inner():
    tasks.start('doomed', boom)
    await asyncio.sleep(60)
async def main():
    {begin}
    try:
        await asyncio.sleep(60)
    finally:
        if {hangs}:
            time.sleep(60)
asyncio.run(tasks.run(main(), grace={0.2 if hangs else 20}))
"""
    ended = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, timeout=30, text=True)
    assert ended.returncode == (tasks.STATUS if hangs else 1), ended.stderr
    assert "background work died: doomed" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr or "sleep" in begin


async def test_the_log_of_a_process_has_the_traceback_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    background = tasks.start("keeper", fails)
    await eventually(lambda: not background.alive)
    [record] = caplog.records
    assert record.name == tasks.LOGGER
    line = SafeFormatter().format(record)
    for part in ('"event": "background work died"', '"task": "keeper"', "Traceback (most recent call last)", "in fails"):
        assert part in line
    assert "ZeroDivisionError" in line and "what the text says" not in line
