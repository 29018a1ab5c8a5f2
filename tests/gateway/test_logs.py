"""The log lets known fields through, and nothing else, whoever writes to it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
import lacre_backend
import lacre_fabric
import lacre_gateway
from lacre.errors import SettingsError
from lacre_fabric.logs import FIELDS, MAX_TEXT, SafeFormatter, last_words, make_log, places
from lacre_gateway.http.logs import standard_logging

SECRET = "s3cr3t-canary"


def written(**fields: object) -> dict[str, object]:
    stream = io.StringIO()
    make_log(stream).info("request", **fields)
    [line] = stream.getvalue().splitlines()
    entry: dict[str, object] = json.loads(line)
    return entry


@given(st.text(min_size=1).filter(lambda name: name not in FIELDS))
def test_unknown_fields_are_dropped(name: str) -> None:
    if name in ("self", "_"):
        return
    assert set(written(**{name: SECRET})) == {"event", "level", "time"}


def test_known_fields_stay_and_are_cut_in_one_line() -> None:
    entry = written(status=200, route="/v1/sealed", duration=0.5, address=None, model="a\n" * 10_000, reason=[SECRET])
    assert (entry["status"], entry["route"], entry["duration"], entry["address"]) == (200, "/v1/sealed", 0.5, None)
    assert len(str(entry["model"])) == MAX_TEXT and "reason" not in entry


def raised() -> BaseException:
    try:
        raise ValueError(SECRET)
    except ValueError as exc:
        return exc


def test_of_an_exception_its_type_and_places() -> None:
    assert places(raised())["error"] == "ValueError"
    assert places(raised())["at"].startswith("test_logs.py:")
    assert SECRET not in json.dumps(places(raised()))


def test_libraries_records() -> None:
    """Their format string is logged, their arguments and exceptions' texts are not."""
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "p", 1, "failed for %s", (SECRET,), None)
    exc = raised()
    record.exc_info = (type(exc), exc, exc.__traceback__)
    line = SafeFormatter().format(record)
    assert SECRET not in line
    entry = json.loads(line)
    assert (entry["event"], entry["error"], entry["logger"]) == ("failed for %s", "ValueError", "uvicorn.error")


async def test_what_asyncio_tells_of_a_failure() -> None:
    """It writes reprs into the message itself."""
    stream, loop, logger = io.StringIO(), asyncio.get_running_loop(), logging.getLogger("asyncio")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter())
    logger.addHandler(handler)
    before = loop.get_exception_handler()
    loop.set_exception_handler(None)  # asyncio's own
    try:
        loop.call_soon(int, SECRET)  # "Exception in callback int('...')"
        loop.call_exception_handler({"message": "Task exception was never retrieved", "exception": raised()})
        await asyncio.sleep(0.01)
    finally:
        logger.removeHandler(handler)
        loop.set_exception_handler(before)
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert SECRET not in stream.getvalue()
    assert {entry["event"] for entry in told} == {"Task exception was never retrieved", "Exception in callback int"}
    assert {entry["error"] for entry in told} == {"ValueError"}


def test_the_last_words_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, last_words():
        raise ValueError(SECRET)
    told = json.loads(capsys.readouterr().err)
    assert (ended.value.code, told["event"], told["error"]) == (1, "crashed", "ValueError")
    assert SECRET not in json.dumps(told)
    with pytest.raises(SettingsError), last_words():
        raise SettingsError("for whoever started it")


class Telling:
    """Whatever asks it for text is told the secret."""

    def __repr__(self) -> str:
        return SECRET


def chained() -> BaseException:
    """A secret in the exception, in its cause, in its context, in its notes and in its arguments."""
    try:
        try:
            try:
                raise KeyError(SECRET)
            except KeyError:
                raise OSError(5, SECRET, SECRET)  # noqa: B904 - a context, not a cause
        except OSError as exc:
            raise ExceptionGroup(SECRET, [ValueError(SECRET), TypeError(Telling())]) from exc
    except ExceptionGroup as group:
        group.add_note(SECRET)
        return group


SHAPES = [
    SECRET, SECRET.encode(), [SECRET], (SECRET,), {SECRET}, {"a": {"b": [SECRET]}}, {SECRET: 1}, Telling(), chained(),
    type("Secret", (), {"value": SECRET}),
]  # fmt: skip


def names_of_the_house() -> set[str]:
    """Every word that our own code has: whatever could become a keyword of a call to the log."""
    rooms = [Path(module.__file__ or "").parent for module in (lacre, lacre_fabric, lacre_gateway, lacre_backend)]
    return {name for room in rooms for path in room.rglob("*.py") for name in re.findall(r"[A-Za-z_]\w*", path.read_text())}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_a_secret_under_every_unknown_key(shape: object) -> None:
    stream = io.StringIO()
    unknown = dict.fromkeys((names_of_the_house() | {"stack_info", "prompt", "", "a b"}) - FIELDS - {"self"}, shape)
    assert {"authorization", "token", "sealed", "plaintext", "exc_info"} <= set(unknown)
    bound = make_log(stream).bind(**unknown)
    bound.info("request", **unknown)
    bound.error("failed", **dict.fromkeys(FIELDS - {"event", "level", "time"}, shape) if not isinstance(shape, str) else {})
    try:
        raise chained()
    except ExceptionGroup:
        bound.exception("failed", **unknown)
    assert SECRET not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 3


LOGGERS = [
    "", "uvicorn", "uvicorn.error", "uvicorn.access", "nats", "nats.aio.client", "httpx2", "httpcore2", "asyncio",
    "py.warnings",
]  # fmt: skip


@pytest.mark.parametrize("name", LOGGERS)
def test_libraries_that_say_too_much(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, logger = logging.getLogger(), logging.getLogger(name)
    before = root.handlers[:], root.level
    try:
        logging.config.dictConfig(standard_logging("ext://sys.stderr"))
        assert isinstance(root.handlers[0].formatter, SafeFormatter)
        exc = chained()
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
            for shape in SHAPES:
                logger.log(level, "it went %s, %r", shape, shape, extra={"secret": shape, "token": SECRET})
                logger.log(level, "it went", exc_info=exc, stack_info=True)
                if not isinstance(shape, str):
                    logger.log(level, shape)
    finally:
        root.handlers[:], root.level = before
        access = logging.getLogger("uvicorn.access")
        access.propagate = True
        access.setLevel(logging.NOTSET)
    told = capsys.readouterr().err
    assert SECRET not in told
    assert all(json.loads(line)["logger"] for line in told.splitlines())
    assert bool(told) is (name != "uvicorn.access")
