"""Every Python block in README and docs runs, as a file of its own.

Blocks of one document share a folder. One that begins with `# NAME.py` is a module there, for those after it; one that begins
with `# uvicorn MODULE:APP` runs while that app is served, and reaches it where the document says port 8000.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

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
            with served(app[1], tmp_path, shell) as port:
                run(block, block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), tmp_path, shell)
        else:
            run(block, block.text, tmp_path, shell)


def run(block: Block, text: str, folder: Path, shell: dict[str, str]) -> None:
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, check=False, cwd=folder, env=shell, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


@contextmanager
def served(app: str, folder: Path, shell: dict[str, str]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", "--fd", str(listener.fileno()), "--log-level", "warning", app]
        process = subprocess.Popen(command, cwd=folder, env=shell, pass_fds=[listener.fileno()])
        try:
            port = listener.getsockname()[1]
            httpx2.get(f"http://127.0.0.1:{port}/", timeout=60)  # it waits in the socket's queue until the app is there
            yield port
        finally:
            process.terminate()
            process.wait(30)
