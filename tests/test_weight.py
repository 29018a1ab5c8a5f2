"""What an application takes on with the SDK: five dependencies, a small wheel, a quick import, and complete types."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lacre
from parts.npm import install

ROOT = Path(__file__).resolve().parent.parent
SDK = ROOT / "sdk"
TYPING = ROOT / "typing_tests"
# Bytes of the SDK's own files, compressed one by one as they are in the wheel. The generated sync half takes 12 kB of them, and
# logging in as a person 12 kB; routes, formats and usage came to 8 kB.
MAX_WHEEL = 300_000
MAX_PAGE = 75_000  # of the chat page, which came to 54 kB: modules, styles and its Python half
NODE, NPM = shutil.which("node"), shutil.which("npm")


def test_five_dependencies() -> None:
    project = tomllib.loads((SDK / "pyproject.toml").read_text())["project"]
    assert sorted(re.match(r"[\w-]+", each)[0] for each in project["dependencies"]) == [  # type: ignore[index]
        "cryptography", "filelock", "httpx2", "platformdirs", "pyjwt",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    """Built as an index would get it; the SDK's files in it are small, typed, and all that `import lacre` needs."""
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([sys.executable, *build, tmp_path, SDK], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        ours = [entry for entry in packed.infolist() if entry.filename.startswith("lacre/")]
        packed.extractall(tmp_path / "unpacked", [entry.filename for entry in ours])
    page = [entry for entry in ours if entry.filename.startswith("lacre/page/")]
    assert sum(entry.compress_size for entry in page) < MAX_PAGE
    assert sum(entry.compress_size for entry in ours if entry not in page) < MAX_WHEEL
    assert {"lacre/page/static/main.js", "lacre/page/static/base.css", "lacre/page/static/shell.html"} <= {
        entry.filename for entry in page
    }
    assert "lacre/py.typed" in {entry.filename for entry in ours}
    code = f"import lacre; assert lacre.__file__.startswith({str(tmp_path)!r}), lacre.__file__; lacre.Client, lacre.wire"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env={"PYTHONPATH": str(tmp_path / "unpacked")})


def test_every_public_name_is_there() -> None:
    assert [name for name in lacre.__all__ if getattr(lacre, name, None) is None] == []


@pytest.mark.slow
def test_mypy_accepts_what_applications_write() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "typing_tests/clients.py"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")
def test_pyright_does_too() -> None:
    install(TYPING)
    assert "://" not in (TYPING / "package-lock.json").read_text()
    command = [str(NODE), "node_modules/pyright/index.js", "--pythonpath", sys.executable]
    done = subprocess.run(command, check=False, cwd=TYPING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 errors" in done.stdout
