"""The images, built once for all tests of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lacre_fabric.operate.nats_server import executable
from parts.containers import ROOT, Engine, Images, engine, tell


@pytest.fixture(scope="session")
def podman() -> Iterator[Engine]:
    with engine(Path(tempfile.mkdtemp(prefix="lacre-containers-"))) as made:
        yield made


@pytest.fixture(scope="session")
def images(podman: Engine) -> Images:
    wheels = Path(os.environ.get("LACRE_WHEELS") or _machines_wheel())
    tell(f"llama-cpp-python: {next(wheels.glob('*.whl')).name} of {wheels.name}; an image without /wheels compiles its own")
    timed("base", podman.make_base)
    return Images(
        timed("gateway", lambda: podman.build("gateway", wheels)),
        timed("worker", lambda: podman.build("worker", wheels)),
        timed("nats", lambda: podman.build_nats(Path(executable()).resolve())),
    )


def _machines_wheel() -> str:
    command = [sys.executable, str(ROOT / "tools" / "bootstrap.py"), "--wheel"]
    return str(Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]).parent)


def timed(what: str, do: Callable[[], str | None]) -> str:
    began = time.monotonic()
    made = do()
    tell(f"{what}: built in {time.monotonic() - began:.0f} s")
    return made or ""
