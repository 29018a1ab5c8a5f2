"""The chat templates that come with llama.cpp, as the locked llama-cpp-python's source archive has them. None is kept here."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Final

import pytest

IN_ARCHIVE: Final = re.compile(r"[^/]+/vendor/llama\.cpp/models/templates/([^/]+)\.jinja")


@pytest.fixture(scope="session")
def templates(llama_cpp_source: Path) -> dict[str, str]:
    """By their names."""
    found = {}
    with tarfile.open(llama_cpp_source) as archive:
        for member in archive:
            if (matched := IN_ARCHIVE.fullmatch(member.name)) and (data := archive.extractfile(member)):
                found[matched[1]] = data.read().decode()
    return dict(sorted(found.items(), key=lambda each: f"{each[0]}.jinja"))
