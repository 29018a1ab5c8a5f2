"""A process's log: JSON lines from structlog, with allow-listed fields only.

Rules:
- A field that is not in `FIELDS` is dropped. So is a value that is not a number, text or truth value.
- Events are constants in the code. Variable data goes into fields.
- Records of other libraries (uvicorn, nats) log their constant format string, never the arguments. An asyncio record logs only
  the beginning, because asyncio formats arguments into its messages.
- An exception logs its type and places in the code, never its text.
- A background task that died (`lacre.runtime.tasks`) logs its whole traceback: every frame and every cause, but no exception
  texts.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

from lacre.errors import LacreError
from lacre.runtime import tasks

FIELDS: Final = frozenset({
    "event", "level", "time", "logger", "error", "at",
    "request_id", "method", "route", "status", "duration", "address", "problem",
    "pool", "model", "action", "outcome", "reason", "kind", "denied", "role", "remedy", "version", "host", "port", "seconds",
    "node", "key_id", "issuer", "gateway", "process", "task", "traceback", "number", "accepted", "limit", "scope", "id",
})  # fmt: skip
MAX_TEXT: Final = 256
MAX_TRACEBACK: Final = 16 * 1024  # characters: about a hundred frames; a recursion error must not fill a disk
_FRAMES: Final = 6
_VALUES: Final = re.compile(r"[(<\n].*", re.DOTALL)  # where arguments, objects and exceptions begin in an asyncio message

Log = structlog.typing.FilteringBoundLogger


class Level:
    """The structlog processor that drops lines below a level. The level may change while the process runs."""

    def __init__(self, name: str) -> None:
        """name: `info`, `warning` or `error`."""
        self.set(name)

    def set(self, name: str) -> None:
        self._least: int = logging.getLevelNamesMapping()[name.upper()]

    def __call__(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if structlog.processors.NAME_TO_LEVEL[method] < self._least:
            raise structlog.DropEvent
        return event


def make_log(stream: TextIO, level: Level | None = None) -> Log:
    """A log that writes to `stream`. It belongs to one app; no global configuration changes. level: None: all lines."""
    return log_by(structlog.WriteLogger(stream), level)  # one write per line


def log_by(logger: object, level: Level | None = None) -> Log:
    """As `make_log`. logger: has a method for each level, which gets the finished line without its end."""
    log: Log = structlog.wrap_logger(
        logger,
        processors=PROCESSORS if level is None else (level, *PROCESSORS),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    return log


def allow_list(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor that keeps only known fields with plain values."""
    return {
        name: value if not isinstance(value, str) or len(value) <= MAX_TEXT else _cut(name, value)
        for name, value in event.items()
        if name in FIELDS and isinstance(value, _PLAIN)
    }


_PLAIN: Final = (str, int, float, bool, type(None))


def _cut(name: str, text: str) -> str:
    return text[: MAX_TRACEBACK if name == "traceback" else MAX_TEXT]


def _line(_logger: object, _method: str, event: Mapping[str, Any]) -> str:
    """The event as JSON. Scripts look for the spaces that the standard library writes, so no other library writes it."""
    return json.dumps(event)


def _add_time(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["time"] = round(time.time(), 3)
    return event


PROCESSORS: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.processors.add_log_level,
    _add_time,
    allow_list,
    _line,
)


class SafeFormatter(logging.Formatter):
    """Formats records of the standard library's logging by the same rules."""

    def format(self, record: logging.LogRecord) -> str:
        # A message can be any object, for example an exception. Log only its type.
        text = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        event: dict[str, Any] = {
            "event": _VALUES.sub("", text) if record.name == "asyncio" else text,
            "level": record.levelname.lower(),
            "time": round(record.created, 3),
            "logger": record.name,
        }
        if record.exc_info and record.exc_info[1] is not None:
            event |= places(record.exc_info[1])
        if record.name == tasks.LOGGER:
            # The message is a constant plus the task's name. Both come from the code.
            event |= {"event": text.partition(":")[0], "task": getattr(record, "task", "")}
            if record.exc_info and record.exc_info[1] is not None:
                event["traceback"] = whole(record.exc_info[1])
        return json.dumps(allow_list(None, "", event))


def places(exc: BaseException) -> dict[str, str]:
    """The loggable parts of an exception: its type and where it was raised."""
    frames = traceback.extract_tb(exc.__traceback__)[-_FRAMES:]
    return {
        "error": type(exc).__name__,
        "at": " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames),
    }


def whole(exc: BaseException) -> str:
    """The traceback of an exception and its causes as Python prints it, without the exceptions' texts."""
    parts: list[str] = []
    seen: set[int] = set()
    error: BaseException | None = exc
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(error).__qualname__}\n")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nwhich led to:\n".join(reversed(parts))[-MAX_TRACEBACK:]  # the end names the place


@contextmanager
def last_words() -> Iterator[None]:
    """Logs an unexpected exception that ends the process. Python's own traceback would print the exception's text.

    A LacreError passes: its text is meant for the operator. So does an OSError about a named file, which the command explains
    at its end (`lacre.cli.ending`).
    """
    try:
        yield
    except LacreError:
        raise
    except OSError as exc:
        if exc.filename is not None:
            raise
        make_log(sys.stderr).error("crashed", **places(exc))
        raise SystemExit(1) from None
    except Exception as exc:  # noqa: BLE001 - the process ends here: nothing is left to raise it to
        make_log(sys.stderr).error("crashed", **places(exc))
        raise SystemExit(1) from None


def of_command(level: int = logging.WARNING) -> None:
    """For every command that does not say otherwise: our loggers write from this level up, and to stderr."""
    structlog.configure(
        processors=list(PROCESSORS),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),  # what is stderr when the line is written
    )


def only_errors() -> None:
    """For a command that reports what it finds: our loggers write only errors, and to stderr. The data goes to stdout."""
    structlog.configure(
        processors=list(PROCESSORS),
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def configure(stream: TextIO) -> None:
    """Configures structlog and the standard library's logging to write to `stream`. For a process that uses only the fabric's
    and its own loggers.
    """
    structlog.configure(
        processors=list(PROCESSORS),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
