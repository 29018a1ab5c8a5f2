"""A minute of it: what strikes, asks and judges is itself run, whole. `make chaos` is the same for longer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from chaos.balancer import installed
from chaos.findings import Result
from chaos.run import BY_NODE, RATE, run
from parts.npm import install

PACKAGE = Path(__file__).resolve().parents[2] / "sdk" / "javascript"
SEED, SECONDS = 7, 60
NONE = {"ends": [], "receipts": [], "books": [], "logs": [], "lives": []}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(installed() is None, reason="nginx is not installed (Debian: apt-get install nginx-light)"),
]


def check(result: Result) -> None:
    print(result)
    assert result.violations == NONE
    assert sum(result.ended.values()) == SECONDS * RATE
    assert result.ended["whole"] > SECONDS * RATE / 3  # most of this minute something is away
    assert result.proofs >= result.ended["whole"]


async def test_a_minute(tmp_path: Path) -> None:
    result = await run(tmp_path, SEED, SECONDS)
    check(result)
    assert {"kill-gateway", "kill-worker", "kill-server", "leader", "keys", "policies"} <= set(result.strikes)
    tools = {"partition": shutil.which("ip"), "disk": shutil.which("mount"), "skew": shutil.which("faketime")}
    able = {kind for kind, tool in tools.items() if tool is not None and (kind == "skew" or os.geteuid() == 0)}
    assert not able & result.left_out.keys()  # where its tools are, a strike is not left out in silence
    assert able <= set(result.strikes)


@pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed")
async def test_a_minute_of_the_npm_package(tmp_path: Path) -> None:
    """The same strikes, and the same is asked of what came of them."""
    install(PACKAGE)
    check(await run(tmp_path, SEED, SECONDS, BY_NODE))
