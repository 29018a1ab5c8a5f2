"""Runs a runbook as the session of a shell (see `parts.shell_session`).

A runbook `docs/runbooks/NAME-OF-IT.md` may have a module `name_of_it` here. Its `staged(folder)` is an async context manager.
That sets up what the runbook presupposes, and yields a `Stage`. All others find the programs of `examples/site`, with which
they make their own deployment.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from parts.shell_session import Session, blocks

_ROOT: Final = Path(__file__).resolve().parents[3]
FOLDER: Final = _ROOT / "docs" / "runbooks"
INDEX: Final = FOLDER / "README.md"
RUNBOOKS: Final = {page.stem: page for page in sorted(FOLDER.glob("*.md")) if page != INDEX}
STAGES: Final = {path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py")} - {"--init--"}
SECONDS: Final = 500.0  # a busy machine takes its time


async def _nothing_more(_said: str) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """environment: more variables of the operator's shell. check: looks at the deployment afterwards, given the output."""

    environment: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[str], Awaitable[None]] = _nothing_more


@asynccontextmanager
async def programs(folder: Path) -> AsyncIterator[Stage]:
    """Those of `examples/site`, with which a session makes its own deployment."""
    for program in (_ROOT / "examples" / "site").iterdir():
        (folder / program.name).symlink_to(program)
    yield Stage()


def stage_of(name: str) -> Callable[[Path], AbstractAsyncContextManager[Stage]]:
    if name not in STAGES:
        return programs
    module = importlib.import_module(f"parts.runbooks.{name.replace('-', '_')}")
    staged: Callable[[Path], AbstractAsyncContextManager[Stage]] = module.staged
    return staged


async def run(name: str, folder: Path) -> None:
    """Runs the runbook of that name in the folder. Raises SessionFailed, which shows the session so far."""
    page = blocks(RUNBOOKS[name].read_text(), f"{name}.md")
    async with stage_of(name)(folder) as stage:
        await stage.check(await Session(folder, SECONDS, stage.environment).run(page))
