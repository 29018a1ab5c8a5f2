"""Runs a runbook: its shell blocks are one session of bash.

Each runbook `docs/runbooks/NAME-OF-IT.md` has a module `name_of_it` here. Its `staged(folder)` is an async context manager. It
sets up what the runbook presupposes, and yields a `Stage`.

Rules:
- All blocks of the language `sh` run as they stand, in one shell that ends at the first failure.
- Each line of a `text` block must be in the session's output. `…` stands for any characters.
- No other block is allowed, because nobody would run it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parents[3] / "docs" / "runbooks"
SESSION: Final = 500.0  # seconds; the machine may be busy
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
_WHOLE = "the session reached its end"
_FORGIVEN = re.compile(r"\|\| *(?:true|:)|set \+e|^ *exit\b", re.MULTILINE)


async def _nothing_more(_said: str) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """environment: more variables of the operator's shell. check: looks at the deployment afterwards, given the output."""

    environment: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[str], Awaitable[None]] = _nothing_more


def stage_of(name: str) -> Callable[[Path], AbstractAsyncContextManager[Stage]]:
    module = importlib.import_module(f"parts.runbooks.{name.replace('-', '_')}")
    staged: Callable[[Path], AbstractAsyncContextManager[Stage]] = module.staged
    return staged


def blocks(text: str) -> tuple[list[str], list[str]]:
    """Its commands and the output that it shows."""
    found = _BLOCK.findall(text)
    assert len(_FENCE.findall(text)) == 2 * len(found), "a block whose fence hides it from this test"
    assert {language for language, _ in found} <= {"sh", "text"}, "a block that nobody runs"
    commands = [block for language, block in found if language == "sh"]
    assert commands, "no command"
    assert not _FORGIVEN.search("".join(commands)), "a command whose failure would go unseen"
    return commands, [line for language, block in found if language == "text" for line in block.splitlines() if line.strip()]


def check_shown(shown: list[str], said: str) -> None:
    for line in shown:
        pattern = r"[^\n]*".join(map(re.escape, re.split("…", " ".join(line.split()))))
        lines = "\n".join(" ".join(one.split()) for one in said.splitlines())
        assert re.search(pattern, lines), f"the runbook shows {line!r}, which nothing printed:\n{said}"


async def run(text: str, folder: Path, stage: Stage) -> str:
    """Runs the session in the folder, and returns its output. Ends what it left running. text: the runbook."""
    commands, shown = blocks(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "OPENAI_", "XDG_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = folder / "session.log"
    with said.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            "bash", "-euxo", "pipefail", "-c", "".join([*commands, f"{{ set +x; }} 2>/dev/null\necho '{_WHOLE}'\n"]),
            cwd=folder, env={**kept, "PATH": path, **stage.environment}, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(SESSION):
                await process.wait()
            heard = said.read_text(errors="replace")
            assert process.returncode == 0, heard
            assert f"\n{_WHOLE}\n" in heard, heard
            check_shown(shown, heard)
            await stage.check(heard)
        except TimeoutError:
            raise AssertionError(
                f"the session did not end within {SESSION:.0f} s:\n{said.read_text(errors='replace')}"
            ) from None
        finally:
            await _end(process)
    return heard


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the session's processes, first in order."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            for _ in range(50):
                os.killpg(process.pid, 0)
                await asyncio.sleep(0.1)
    await process.wait()
