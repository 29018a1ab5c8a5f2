"""Which file `lacre up` serves as the default model: the type that `lacre model default` found to be the fastest here.

Rules:
- If anything fails, the shipped file is served: a lower speed is no reason not to start.
- A child process finds it, because only the backend reads model files. It is ended if it takes too long.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.runtime import tasks
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.work.model_names import DEFAULT_MODEL

COMMAND: Final = (*PYTHON, "-m", "lacre", "model", "default", "--json")
LIMIT: Final = 240.0  # seconds: it may wait 120 s for another process that measures, and then work itself

_LEAVE: Final = 5.0  # seconds to end after SIGTERM


@dataclass(frozen=True, slots=True)
class DefaultFile:
    """path: None for the shipped file. told: the line that says which file is served, and why."""

    path: Path | None
    told: str


async def fastest(tell: Callable[[str], None], command: tuple[str, ...] = COMMAND, limit: float = LIMIT) -> DefaultFile:
    """tell: gets the lines that the child writes while it works. It raises nothing."""
    process = await asyncio.create_subprocess_exec(
        *leashed(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit):
            said, _ = await tasks.together(_all(process.stdout), _lines(process.stderr, tell))
            status = await process.wait()
    except TimeoutError:
        return _shipped(f"`lacre model default` took more than {limit:.0f} s")
    finally:
        if process.returncode is None:
            await _end(process)
    if status != 0:
        return _shipped(f"`lacre model default` ended with status {status}")
    try:
        return _served(Members.parse(said, "the answer of `lacre model default`"))
    except InvalidMessage as exc:
        return _shipped(str(exc))


async def _end(process: asyncio.subprocess.Process) -> None:
    """It gets a moment to remove what it has begun to write."""
    process.terminate()
    with suppress(TimeoutError):
        async with asyncio.timeout(_LEAVE):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _all(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()


async def _lines(stream: asyncio.StreamReader | None, tell: Callable[[str], None]) -> bytes:
    """Tells each, and returns the last one."""
    last = b""
    while stream is not None and (line := await stream.readline()):
        last = line
        tell(line.decode(errors="replace").rstrip())
    return last


def _served(members: Members) -> DefaultFile:
    """Raises InvalidMessage."""
    path = None if members.flag("shipped") else Path(members.text("path"))
    return DefaultFile(path, f"{DEFAULT_MODEL}: {members.text('told')} (`lacre model default` has the figures)")


def _shipped(why: str) -> DefaultFile:
    return DefaultFile(None, f"{DEFAULT_MODEL}: the shipped file, because {why}")
