"""The log lets known fields through, and nothing else, whoever writes to it."""

from __future__ import annotations

import io
import json
import logging
import logging.config

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_fabric.logs import FIELDS, MAX_TEXT, SafeFormatter, make_log, places
from lacre_gateway.logs import standard_logging

SECRET = "s3cr3t-canary"


def written(**fields: object) -> dict[str, object]:
    stream = io.StringIO()
    make_log(stream).info("request", **fields)
    entry: dict[str, object] = json.loads(stream.getvalue())
    return entry


@given(st.text(min_size=1).filter(lambda name: name not in FIELDS))
def test_unknown_fields_are_dropped(name: str) -> None:
    if name in ("self", "_"):
        return
    entry = written(**{name: SECRET})
    assert SECRET not in json.dumps(entry)
    assert set(entry) == {"event", "level", "time"}


@pytest.mark.parametrize(
    "name", ["authorization", "token", "headers", "body", "path", "query", "exception", "exc_info", "stack"]
)
def test_tempting_fields_are_dropped(name: str) -> None:
    assert SECRET not in json.dumps(written(**{name: SECRET}))


@pytest.mark.parametrize("value", [{"a": SECRET}, [SECRET], SECRET.encode(), ValueError(SECRET)])
def test_values_that_may_hold_anything_are_dropped(value: object) -> None:
    assert "reason" not in written(reason=value)


def test_known_fields_stay() -> None:
    entry = written(status=200, route="/v1/sealed", duration=0.5, address=None)
    assert (entry["status"], entry["route"], entry["duration"], entry["address"]) == (200, "/v1/sealed", 0.5, None)


def test_long_values_are_cut() -> None:
    assert len(str(written(model="x" * 10_000)["model"])) == MAX_TEXT


def test_one_line_each() -> None:
    stream = io.StringIO()
    make_log(stream).info("request", model="a\nb")
    assert stream.getvalue().count("\n") == 1


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


def test_standard_logging_is_valid() -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logging.config.dictConfig(standard_logging("ext://sys.stderr"))
        [handler] = logging.getLogger().handlers
        assert isinstance(handler.formatter, SafeFormatter)
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = before
