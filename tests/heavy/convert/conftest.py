"""What `lacre model convert` needs, and a checkpoint of Hugging Face that is made of the default model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from heavy.conftest import ROOT, Environment
from lacre_backend.models.gguf import default_path
from lacre_backend.workshop import converter
from lacre_backend.workshop.converter import ConverterPlace

HERE: Final = Path(__file__).parent
LOCK: Final = ROOT / "requirements/native.lock"


@pytest.fixture(scope="session")
def where(environment_with_torch: Environment, tmp_path_factory: pytest.TempPathFactory) -> ConverterPlace:
    """The environment with PyTorch, which is kept, and the locked source archive."""
    python = Path(environment_with_torch("convert"))
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    made = tmp_path_factory.mktemp("sources")
    # Built by nobody: what builds it is here already, and tells pip its name and version.
    source = ["--no-deps", "--require-hashes", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    subprocess.run([sys.executable, *pip, "download", *source, "-r", LOCK, "--dest", made], check=True)
    return converter.place(python, made / converter.ARCHIVE)


@pytest.fixture(scope="session")
def checkpoint(where: ConverterPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Treat it as read-only."""
    folder = tmp_path_factory.mktemp("checkpoint") / "smollm2"
    subprocess.run([where.python, "-P", HERE / "checkpoint.py", default_path(), folder], check=True)
    return folder
