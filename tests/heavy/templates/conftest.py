"""The chat templates that come with llama.cpp, as the locked llama-cpp-python's source archive has them. None is kept here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from heavy.conftest import ROOT

LOCK: Final = ROOT / "requirements/native.lock"
IN_ARCHIVE: Final = re.compile(r"[^/]+/vendor/llama\.cpp/models/templates/([^/]+)\.jinja")


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """By their names."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lacre" / "templates" / sha256(LOCK.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        _fetch(folder)
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


def _fetch(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
        # Built by nobody: what builds it is here already, and tells pip its name and version.
        source = ["--no-deps", "--require-hashes", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, *source, "-r", LOCK, "--dest", made], check=True)
        (archive,) = Path(made).glob("*.tar.gz")
        found = Path(made) / "found"
        found.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                if (matched := IN_ARCHIVE.fullmatch(member.name)) and (data := tar.extractfile(member)):
                    (found / f"{matched[1]}.jinja").write_bytes(data.read())
        found.replace(folder)
