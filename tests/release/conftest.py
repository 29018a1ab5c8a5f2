"""What `make dist` makes, made once for all tests here, from the working tree as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def new_key(folder: Path, *, passphrase: str = "", kind: str = "ed25519") -> Path:
    path = folder / f"key-{kind}{passphrase}"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", path], check=True)
    return path


def make_dist(out: Path, key: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/dist.py", "--allow-dirty", "--out", out]
    done = subprocess.run(command, check=False, env=os.environ | {"DIST_KEY": str(key)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Path:
    """A folder: do not change it, but a copy of it."""
    out = tmp_path_factory.mktemp("made") / "dist"
    make_dist(out, key)
    return out
