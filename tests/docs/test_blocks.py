"""Every Python block in README and docs runs, as a file of its own.

Blocks of one document share a folder. One that begins with `# NAME.py` is a module there, for those after it; one that begins
with `# uvicorn MODULE:APP` runs while that app is served, and reaches it where the document says port 8000.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import ran, served

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, text.count("\n", 0, found.start()) + 2, found[1])


def test_every_block_is_seen() -> None:
    """None hides behind another spelling of the fence."""
    for document in DOCUMENTS:
        fences = re.findall(r"^\s*```\s*(?:py|python)\w*", document.read_text(), re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(list(blocks(document))), document


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if list(blocks(document))], ids=lambda path: path.name)
def test_blocks_run(document: Path, tmp_path: Path, shell: dict[str, str]) -> None:
    for block in blocks(document):
        first = block.text.partition("\n")[0]
        if named := re.match(r"# (\w+\.py)", first):
            (tmp_path / named[1]).write_text(block.text)
        elif app := re.match(r"# uvicorn (\w+:\w+)", first):
            with served(app[1], tmp_path, shell) as client:
                text = block.text.replace("127.0.0.1:8000", client.base_url.netloc.decode())
                ran(["-c", text], shell, block, cwd=tmp_path)
        else:
            ran(["-c", block.text], shell, block, cwd=tmp_path)
