"""Runs a job in a child process: `python -m lacre_backend.workshop.child MODULE:JOB`.

Why a process: llama.cpp asserts on some files, and writes over a file that it reads; both end the process. Here that ends the
job alone, which says so.

Rules:
- A question goes in as JSON on stdin, because an argument is visible to other users. Progress and the answer come out as
  lines of JSON on a pipe of their own, so that nothing that a library prints is taken for them.
- The child writes no core dump, which would contain weights. If its parent ends, it ends too.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import IO, Any, Final, Generic, TypeVar

from pydantic import TypeAdapter

from lacre.errors import LacreError, SettingsError, UsageError
from lacre_backend.engine.ended import how as how_ended
from lacre_backend.engine.shards import check_name

Asked = TypeVar("Asked")
Told = TypeVar("Told")
# What is done, and its share of the whole, 0 to 1.
Report = Callable[[str, float], None]

_PR_SET_PDEATHSIG: Final = 1
_SAID: Final = 64 * 1024  # bytes of a dead child's output that are searched for its last words
_LAST_WORDS: Final = 300  # characters of them that are told
_CAUSES: Final = ("ASSERT", "error", "Error", "what()", "failed")


class JobFailed(SettingsError):
    """The child ended without an answer."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Asked, Told]):
    """place: `module:NAME` of this value. work: runs in the child, and may raise LacreError or OSError, which `run` raises."""

    place: str
    asked: type[Asked]
    told: type[Told]
    work: Callable[[Asked, Report], Told]


def run(job: Job[Asked, Told], question: Asked, report: Report = lambda _what, _share: None) -> Told:
    """The answer of a job. Raises SettingsError with the child's own words, or JobFailed if it died."""
    _check_names(question)
    answer, answers = os.pipe()
    command = [sys.executable, "-P", "-m", __name__, job.place, str(answers)]
    with tempfile.TemporaryFile() as said, os.fdopen(answer, "rb") as lines:
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, pass_fds=(answers,))
        finally:
            os.close(answers)
        with child:
            try:
                _ask(child, TypeAdapter(job.asked).dump_json(question))
                told = _told(lines, report)
            except BaseException:
                child.kill()
                raise
        if told is None:
            raise JobFailed(_death(child.returncode, said))
    if "error" in told:
        raise SettingsError(str(told["error"]))
    return TypeAdapter(job.told).validate_python(told["answer"])


def _check_names(question: Any) -> None:
    """Raises SettingsError for a path that JSON cannot hold."""
    for value in (getattr(question, member.name) for member in fields(question)):
        if isinstance(value, Path):
            check_name(value)
        elif is_dataclass(value):
            _check_names(value)


def _ask(child: subprocess.Popen[bytes], question: bytes) -> None:
    if child.stdin is not None:
        with suppress(BrokenPipeError), child.stdin as stdin:  # a child that died at once tells why by its exit
            stdin.write(question)


def _told(lines: IO[bytes], report: Report) -> dict[str, Any] | None:
    """The last line. None if the child ended before it."""
    for line in lines:
        try:
            value: dict[str, Any] = json.loads(line)
        except ValueError:
            return None  # cut off by its death
        if "share" not in value:
            return value
        report(str(value["what"]), float(value["share"]))
    return None


def _death(code: int, said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID))
    lines = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    words = next((line for line in reversed(lines) if any(cause in line for cause in _CAUSES)), "it gives no reason")
    ended = how_ended(code)
    helps = "The machine may have too little memory." if code == -signal.SIGKILL else "Check the model file and the options."
    return f"llama.cpp ended with {ended} at this work: {words[-_LAST_WORDS:]}. Nothing was written. {helps}"


# In the child


def main(place: str, answers: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # ggml would start a debugger
    with os.fdopen(answers, "w", encoding="utf-8", buffering=1) as out:
        out.write(json.dumps(_outcome(place, sys.stdin.buffer.read(), out)) + "\n")


def _outcome(place: str, question: bytes, out: IO[str]) -> dict[str, Any]:
    module, _, name = place.partition(":")
    job: Job[Any, Any] = getattr(importlib.import_module(module), name)

    def report(what: str, share: float) -> None:
        out.write(json.dumps({"what": what, "share": round(share, 4)}) + "\n")

    try:
        answer = job.work(TypeAdapter(job.asked).validate_json(question), report)
    except LacreError as exc:
        return {"error": _with_remedy(exc)}
    except OSError as exc:
        named = "" if exc.filename is None else f"{exc.filename}: "
        return {"error": f"{named}{exc.strerror or exc}. Check the path, its permissions and the free space."}
    except MemoryError:
        return {"error": "There is too little memory for this model. Stop other programs, or use a larger machine."}
    return {"answer": TypeAdapter(job.told).dump_python(answer, mode="json")}


def _with_remedy(error: LacreError) -> str:
    """The parent raises SettingsError, whose message says what helps."""
    said = str(error)
    if error.remedy in (LacreError.remedy, UsageError.remedy, SettingsError.remedy) or error.remedy in said:
        return said
    return f"{said.rstrip('.')}. {error.remedy}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
