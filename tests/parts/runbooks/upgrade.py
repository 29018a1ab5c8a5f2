"""A stopped practice deployment, and the previous version and this one beside it, as two installations."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from parts.runbooks import Stage
from parts.versions import ROOT, Version, environment, previous, this


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    for program in (ROOT / "examples" / "site").iterdir():
        (folder / program.name).symlink_to(program)
    old = await asyncio.to_thread(previous)
    for version in (old, this()):
        _installed(folder / "releases" / version.name, version)
    (folder / "current").symlink_to("releases/new")
    # The previous version may lack a command of `deploy`; it reads what this one made. Its rules are its own.
    await _done(folder, "./deploy && ./service end")
    shutil.rmtree(folder / "gateway" / "policies")
    shutil.copytree(old.sources / "policies", folder / "gateway" / "policies")
    (folder / "current").unlink()
    (folder / "current").symlink_to("releases/old")
    yield Stage()


def _installed(folder: Path, version: Version) -> None:
    """A folder like that of an environment, as far as a shell uses it."""
    command = folder / "bin" / "lacre"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.join(version.running)} lacre "$@"\n')
    command.chmod(0o755)


async def _done(folder: Path, commands: str) -> None:
    path = os.pathsep.join([str(folder / "current" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", commands, cwd=folder, env=environment() | {"PATH": path, "HOME": str(folder)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode(errors="replace")
