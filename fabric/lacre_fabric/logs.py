"""A process's log: JSON lines by structlog, of allow-listed fields only.

Rules:
- A field that is not in `FIELDS` is dropped, whatever it holds; so is a value that is not a number, text or truth value.
- Events are constants of the code. What varies goes into a field.
- Of other libraries' records (uvicorn, nats) the constant format string is logged and never its arguments; of an exception its
  type and the places in the code, never its text. asyncio writes both into the message itself: of that, the beginning.
- Of background work that died (`lacre.runtime.tasks`), the whole traceback is logged: every frame and every cause, and no
  text either.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator, MutableMapping
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
    "node", "key_id", "issuer", "gateway", "process", "task", "traceback", "number",
})  # fmt: skip
MAX_TEXT: Final = 256
MAX_TRACEBACK: Final = 16 * 1024  # characters: some hundred frames, and a recursion error does not fill a disk
_FRAMES: Final = 6
_VALUES: Final = re.compile(r"[(<\n].*", re.DOTALL)  # of an asyncio message: where arguments, objects and exceptions begin

Log = structlog.typing.FilteringBoundLogger


def make_log(stream: TextIO) -> Log:
    """A log that writes to `stream`. It belongs to the app that it is given to; nothing global is configured."""
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(stream),  # one write for a line
        processors=PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    return log


def allow_list(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor that lets only known fields with plain values through."""
    return {name: _plain(name, value) for name, value in event.items() if name in FIELDS and isinstance(value, _PLAIN)}


_PLAIN: Final = (str, int, float, bool, type(None))


def _plain(name: str, value: object) -> object:
    limit = MAX_TRACEBACK if name == "traceback" else MAX_TEXT
    return value[:limit] if isinstance(value, str) else value


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
        # A message that is no text is an object, such as an exception that was logged as it is: its type is all that is told.
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
            # The message is a constant and the work's name, and both are the code's own.
            event |= {"event": text.partition(":")[0], "task": getattr(record, "task", "")}
            if record.exc_info and record.exc_info[1] is not None:
                event["traceback"] = whole(record.exc_info[1])
        return json.dumps(allow_list(None, "", event))


def places(exc: BaseException) -> dict[str, str]:
    """What may be logged of an exception: its type, and where it came from."""
    frames = traceback.extract_tb(exc.__traceback__)[-_FRAMES:]
    return {
        "error": type(exc).__name__,
        "at": " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames),
    }


def whole(exc: BaseException) -> str:
    """The traceback of an exception and of what caused it, as Python prints it, but for the exceptions' texts."""
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
    """What ends a process unforeseen is logged like any exception; Python's own traceback would end in its text.

    A LacreError passes: it was written for whoever started the process. So does an OSError about a named file: the command's
    end explains it (`lacre.cli.ending`).
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
    except Exception as exc:  # noqa: BLE001 - the end of the process: there is nobody left to raise it to
        make_log(sys.stderr).error("crashed", **places(exc))
        raise SystemExit(1) from None


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
