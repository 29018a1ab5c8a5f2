"""A process's log: JSON lines by structlog, of allow-listed fields only.

Rules:
- A field that is not in `FIELDS` is dropped, whatever it holds; so is a value that is not a number, text or truth value.
- Events are constants of the code. What varies goes into a field.
- Of other libraries' records (uvicorn, nats) the constant format string is logged and never its arguments; of an exception its
  type and the places in the code, never its text.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

FIELDS: Final = frozenset({
    "event", "level", "time", "logger", "error", "at",
    "request_id", "method", "route", "status", "duration", "address", "problem",
    "pool", "model", "action", "outcome", "reason", "kind", "denied", "role", "remedy", "version", "host", "port", "seconds",
    "node", "key_id",
})  # fmt: skip
MAX_TEXT: Final = 256
_FRAMES: Final = 6

Log = structlog.typing.FilteringBoundLogger


def make_log(stream: TextIO) -> Log:
    """A log that writes to `stream`. It belongs to the app that it is given to; nothing global is configured."""
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    return log


def allow_list(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor that lets only known fields with plain values through."""
    return {name: _plain(value) for name, value in event.items() if name in FIELDS and isinstance(value, _PLAIN)}


_PLAIN: Final = (str, int, float, bool, type(None))


def _plain(value: object) -> object:
    return value[:MAX_TEXT] if isinstance(value, str) else value


def _add_time(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["time"] = round(time.time(), 3)
    return event


PROCESSORS: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.processors.add_log_level,
    _add_time,
    allow_list,
    structlog.processors.JSONRenderer(),
)


class SafeFormatter(logging.Formatter):
    """Renders a record of the standard library's logging by the same rules."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "event": str(record.msg),
            "level": record.levelname.lower(),
            "time": round(record.created, 3),
            "logger": record.name,
        }
        if record.exc_info and record.exc_info[1] is not None:
            event |= places(record.exc_info[1])
        return json.dumps(allow_list(None, "", event))


def places(exc: BaseException) -> dict[str, str]:
    """What may be logged of an exception: its type, and where it came from."""
    frames = traceback.extract_tb(exc.__traceback__)[-_FRAMES:]
    return {
        "error": type(exc).__name__,
        "at": " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames),
    }


def configure(stream: TextIO) -> None:
    """For a process whose loggers are the fabric's and its own: structlog and the standard library's logging, to `stream`."""
    structlog.configure(
        processors=list(PROCESSORS),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
