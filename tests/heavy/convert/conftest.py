"""What `lacre model convert` needs, and a checkpoint of Hugging Face that is made of the default model."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

from heavy.conftest import Environment
from lacre_backend.models.gguf import default_path
from lacre_backend.workshop import converter
from lacre_backend.workshop.converter import ConverterPlace

HERE: Final = Path(__file__).parent


@pytest.fixture(scope="session")
def where(environment_with_torch: Environment, llama_cpp_source: Path) -> ConverterPlace:
    """The environment with PyTorch, which is kept, and the locked source archive."""
    return converter.place(Path(environment_with_torch("convert")), llama_cpp_source)


@pytest.fixture(scope="session")
def checkpoint(where: ConverterPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Treat it as read-only."""
    folder = tmp_path_factory.mktemp("checkpoint") / "smollm2"
    subprocess.run([where.python, "-P", HERE / "checkpoint.py", default_path(), folder], check=True)
    return folder
