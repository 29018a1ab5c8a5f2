"""A page of documentation as one shell session: its commands run as they stand, and print what the page shows.

Rules:
- A block of `sh` holds commands. All blocks of a page are one bash session, which ends at the first command that fails.
- A block of `text` after it shows what its commands print: each line is a part of a printed line, in this order, among others.
  `…` stands for any text, and spaces of any number count as one. A command that is shown as it runs prints nothing.
- A page has blocks of no other language: nobody would run them.
- A command that is expected to fail says so: `command || echo "exit $?"`, and the page shows the status. A page must not have
  `|| true`, `!`, `exit`, `trap` or `set +e`, which would hide any other failure.
- Variables of this process do not reach the session. So whatever a page uses, it sets.
- No process of the session may outlive it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

ANYTHING = "…"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HIDES = re.compile(r"\|\|\s*(?:true|:)(?:\s|$)|^\s*!\s|\bset \+e\b|^\s*(?:trap|exit)\b", re.MULTILINE)
_MARK = "LACRE_RUNBOOK"  # in the environment of every process of a session: its number, by which they are found again
_LOG_END = 4000  # characters of each process' log that a failure shows


class BadPage(AssertionError):
    """The page is not a session."""


class SessionFailed(AssertionError):
    """A command failed, a line is missing, or a process is left. The text holds the whole session so far."""


@dataclass(frozen=True, slots=True)
class Block:
    """Commands of a page, from a line on, and the lines that they must print."""

    page: str
    line: int
    commands: str
    shown: tuple[str, ...]


def blocks(text: str, name: str = "page") -> list[Block]:
    """Of a page's text. name: of the page, for what is said of it. Raises BadPage."""
    found = list[Block]()
    fences = list(_FENCE.finditer(text))
    if 2 * len(fences) != len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)):
        raise BadPage(f"{name}: a fence that is not closed, or of another spelling")
    for fence in fences:
        line, language, content = text.count("\n", 0, fence.start()) + 2, fence[1], fence[2]
        if language == "sh":
            if hidden := _HIDES.search(content):
                raise BadPage(f"{name}:{line}: {hidden[0].strip()!r} hides failures")
            found.append(Block(name, line, content, ()))
        elif language == "text" and found:
            last = found.pop()
            found.append(replace(last, shown=last.shown + tuple(filter(None, map(_plain, content.splitlines())))))
        else:
            raise BadPage(f"{name}:{line}: a block {language!r} that nobody runs or compares")
    if not found:
        raise BadPage(f"{name} has no commands")
    return found


@dataclass(frozen=True, slots=True)
class Session:
    """One bash in a folder. seconds: how long it may take. environment: more variables than those of a new login."""

    folder: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    async def run(self, page: list[Block]) -> str:
        """All that it printed. Raises SessionFailed."""
        number = uuid.uuid4().hex
        transcript = self.folder / "transcript"
        with transcript.open("wb") as output:  # a file, because a process that is left would hold a pipe open
            process = await asyncio.create_subprocess_exec(
                "bash", "-euo", "pipefail", "-c", script(page, number), cwd=self.folder, env=self._environment(number),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        fault = ""
        try:
            async with asyncio.timeout(self.seconds):
                if status := await process.wait():
                    fault = f"a command failed with {status}"
        except TimeoutError:
            fault = f"it did not end within {self.seconds:.0f} s"
        finally:
            left = _end(number)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        said = transcript.read_text(errors="replace")
        fault = fault or (f"it left processes behind: {', '.join(left)}" if left else "") or missing(page, said, number)
        if fault:
            raise SessionFailed(f"{fault}\n{readable(page, said, number)}{self._logs()}")
        return said

    def _environment(self, number: str) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": str(home), **self.environment, _MARK: number}

    def _logs(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-_LOG_END:]}" for log in logs)


def script(page: list[Block], number: str) -> str:
    """Each command is printed before it runs; a mark that no command prints divides the blocks."""
    parts = [f"{{ printf '\\n%s %s\\n' {number} {place}; }} 2> /dev/null\n{block.commands}" for place, block in enumerate(page)]
    return "PS4='$ '\nset -x\n" + "".join(parts)


def missing(page: list[Block], said: str, number: str) -> str:
    """The first line that a page shows and its block did not print, in this order; empty if there is none."""
    for block, printed in zip(page, _by_block(said, number), strict=True):
        lines = iter(_plain(line) for line in printed.splitlines() if not line.startswith("$"))
        for wanted in block.shown:
            pattern = re.compile(".*".join(map(re.escape, wanted.split(ANYTHING))))
            if not any(pattern.search(line) for line in lines):
                return f"{block.page}:{block.line}: not printed, or not in this order: {wanted}"
    return ""


def _plain(line: str) -> str:
    return " ".join(line.split())


def readable(page: list[Block], said: str, number: str) -> str:
    return "".join(
        f"--- {block.page}:{block.line}\n{printed}" for block, printed in zip(page, _by_block(said, number), strict=False)
    )


def _by_block(said: str, number: str) -> list[str]:
    return re.split(rf"^{number} \d+\n", said, flags=re.MULTILINE)[1:]


def _end(number: str) -> list[str]:
    """Kills the session's living processes; what they ran."""
    mark, found = f"{_MARK}={number}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                os.kill(int(process.name), signal.SIGKILL)
                found.append(command)
    return found
