"""The runbooks, as they stand: every shell block of one is a part of one session.

A session runs in a folder with a site (`site`) and its three message servers (`n1`, `n2`, `n3`), while callers use the first
pool.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from parts.three_servers import deployed

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
SESSION = 240.0  # seconds; the machine may be busy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def session(runbook: Path) -> str:
    """Its shell blocks. No other spelling of the fence hides one."""
    text = runbook.read_text()
    found = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == len(re.findall(r"^ *```\S", text, re.MULTILINE)), "a block of another language, which nobody runs"
    return "".join(found)


async def run(script: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(
        "bash", "-euxo", "pipefail", "-c", script,
        cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SESSION):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("runbook", RUNBOOKS, ids=lambda path: path.stem)
async def test_a_runbook(runbook: Path, tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        await deployment.serve()
        said = await run(session(runbook), tmp_path)
        assert set(deployment.ended) == {"whole"}, said
