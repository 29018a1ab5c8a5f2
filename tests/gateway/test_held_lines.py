"""Lines about requests leave together, in order, and none is lost by the ways in which a gateway's process ends."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lacre_fabric.logs import log_by
from lacre_gateway.http.held_lines import _CAREFUL, HOLD, WHOLE, HeldLines, LineLogger, held_stderr


class Written(io.StringIO):
    """pieces: the text of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def line(number: int) -> str:
    return json.dumps({"number": number, "rest": "x" * 200}) + "\n"


def numbers(text: str) -> list[int]:
    return [json.loads(each)["number"] for each in text.splitlines()]


async def test_the_lines_of_a_while_leave_in_few_writes_and_in_order() -> None:
    stream = Written()
    lines = HeldLines(stream)
    for number in range(400):
        lines.hold(line(number))
        if number % 8 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(3 * HOLD)
    assert numbers(stream.getvalue()) == list(range(400))
    assert len(stream.pieces) < 400 / 8
    assert all(len(piece) <= WHOLE and piece.endswith("\n") for piece in stream.pieces)


async def test_a_lone_line_leaves_at_the_end_of_the_turn() -> None:
    stream = Written()
    lines = HeldLines(stream)
    lines.hold(line(1))
    assert not stream.pieces
    await asyncio.sleep(0)
    assert numbers(stream.getvalue()) == [1]


async def test_a_long_line_leaves_whole_and_by_itself() -> None:
    stream = Written()
    lines = HeldLines(stream)
    for text in ("a\n", "b" * (2 * WHOLE) + "\n", "c\n"):
        lines.hold(text)
    lines.flush()
    assert [len(piece) for piece in stream.pieces] == [2, 2 * WHOLE + 1, 2]


@pytest.mark.parametrize("level", ["warning", "error", "critical"])
async def test_a_warning_leaves_at_once_after_the_lines_before_it(level: str) -> None:
    stream = Written()
    lines = HeldLines(stream)
    log = log_by(LineLogger(lines))
    log.info("request", number=1)
    getattr(log, level)("it went wrong", number=2)
    assert numbers(stream.getvalue()) == [1, 2]
    log.info("request", number=3)  # the process may end by force now
    assert numbers(stream.getvalue()) == [1, 2, 3]


async def test_lines_are_held_again_when_nothing_has_been_wrong_for_a_while() -> None:
    stream = Written()
    lines = HeldLines(stream)
    lines.write("wrong\n")
    lines._careful_until -= _CAREFUL  # as if that time had passed
    lines.hold(line(1))
    assert stream.getvalue() == "wrong\n"
    await asyncio.sleep(0)
    assert stream.getvalue() == "wrong\n" + line(1)


async def test_a_line_of_another_thread_leaves_at_once() -> None:
    stream = Written()
    lines = HeldLines(stream)
    thread = threading.Thread(target=lines.hold, args=(line(1),))
    thread.start()
    thread.join()
    assert numbers(stream.getvalue()) == [1]


async def test_threads_and_the_loop_at_once_lose_and_double_nothing() -> None:
    stream = Written()
    lines = HeldLines(stream)

    def many(first: int) -> None:
        for number in range(first, first + 500):
            (lines.hold if number % 2 else lines.write)(line(number))

    threads = [threading.Thread(target=many, args=(1000 * number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for number in range(500):
        lines.hold(line(number))
        await asyncio.sleep(0)
    for thread in threads:
        thread.join()
    lines.flush()
    found = numbers(stream.getvalue())
    assert sorted(found) == [first + number for first in (0, 1000, 2000, 3000) for number in range(500)]
    for first in (0, 1000, 2000, 3000):
        of_one = [number for number in found if first <= number < first + 500]
        assert of_one == sorted(of_one)


async def test_a_line_waits_for_the_write_before_it() -> None:
    begun, let_go = threading.Event(), threading.Event()

    class Slow(Written):
        def write(self, text: str) -> int:
            if not begun.is_set():
                begun.set()
                let_go.wait(10)
            return super().write(text)

    stream = Slow()
    lines = HeldLines(stream)
    lines.hold(line(1))
    threads = [threading.Thread(target=lines.flush), threading.Thread(target=lines.write, args=(line(2),))]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    let_go.set()
    for thread in threads:
        thread.join()
    assert numbers(stream.getvalue()) == [1, 2]


async def test_a_line_inside_of_a_write() -> None:
    """As when the collector frees a failed task meanwhile, which asyncio logs."""

    class Nested(Written):
        def write(self, text: str) -> int:
            if not self.pieces:
                self.pieces.append("")
                lines.write(line(2))
            return super().write(text)

    lines = HeldLines(Nested())
    lines.hold(line(1))
    lines.flush()
    assert sorted(numbers(lines.getvalue())) == [1, 2]


async def test_everything_is_written_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with held_stderr() as logger:
        await asyncio.sleep(0)
        logger.info("one")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "one\n"


# Processes of their own, whose stderr is a pipe

PROGRAM = """
import asyncio, logging.config, sys, time
import uvloop
from lacre.cli import surroundings
from lacre.runtime import tasks
from lacre_fabric.logs import last_words, log_by
from lacre_gateway.http.held_lines import held_stderr
from lacre_gateway.http.logs import standard_logging

async def main(log):
    for number in range({count}):
        log.info("request", number=number, reason="x" * 150)
        if number % 7 == 0:
            await asyncio.sleep(0)
    {end}

surroundings.settle()
with last_words(), held_stderr() as lines, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    logging.config.dictConfig(standard_logging("ext://sys.stderr"))
    runner.run(tasks.run(main(log_by(lines)), grace=0.2))
"""
COUNT = 100
STUCK = """
    async def dies():
        raise ValueError("s3cr3t")
    tasks.start("a part", dies)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for number in range(COUNT, 2 * COUNT):
        log.info("request", number=number)
    time.sleep(60)
""".replace("COUNT", str(COUNT))


@contextmanager
def program(end: str, count: int = COUNT, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    code = PROGRAM.format(count=count, end=end)
    process = subprocess.Popen([sys.executable, "-c", code], **{"stderr": subprocess.PIPE, **streams})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("end", "count", "status"),
    [
        ("return", COUNT, 0),
        ("sys.exit(3)", COUNT, 3),
        ("raise ValueError('s3cr3t')", COUNT, 1),
        (STUCK, 2 * COUNT, 70),  # its background work died, its loop stands still, and the watchdog ends it by force
    ],
    ids=["returns", "exits", "crashes", "is ended by force"],
)
def test_a_process_that_ends_has_written_its_lines(end: str, count: int, status: int) -> None:
    with program(end) as process:
        _, told = process.communicate(timeout=30)
        assert process.returncode == status
    found = [json.loads(each) for each in told.decode().splitlines()]
    assert [each["number"] for each in found if each["event"] == "request"] == list(range(count))
    assert b"s3cr3t" not in told


def test_a_reader_that_comes_late_gets_everything() -> None:
    """The pipe fills up; the process waits for its reader, and goes on."""
    count = 2000  # some 500 KB
    with program("return", count) as process:
        time.sleep(1.0)
        assert process.poll() is None
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0
    assert numbers(told.decode()) == list(range(count))


def test_a_reader_that_left_stops_nothing() -> None:
    reading, writing = os.pipe()
    with program("print('served', flush=True)", stderr=writing, stdout=subprocess.PIPE) as process:
        os.close(writing)
        os.close(reading)
        told, _ = process.communicate(timeout=30)
        assert (process.returncode, told) == (0, b"served\n")


def test_processes_that_share_a_pipe_keep_each_line_whole() -> None:
    reading, writing = os.pipe()
    with program("return", 1000, stderr=writing) as one, program("return", 1000, stderr=writing) as two:
        os.close(writing)
        with os.fdopen(reading, "rb") as told:
            found = numbers(told.read().decode())
        assert (one.wait(30), two.wait(30)) == (0, 0)
    assert sorted(found) == sorted([*range(1000), *range(1000)])
