"""Versions of Lacre that run beside each other: this tree, and the previous one, whose commit `tests/upgrade/previous-version`
names.

The previous version's sources come from this repository's history, and are kept outside the tree. Its processes run in this
environment, with its sources first on the path, if everything that its locks pin is installed here. Otherwise they get an
environment of their own.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = ROOT / "tests" / "upgrade" / "previous-version"
WITHIN = Path(__file__).with_name("within.py")
PACKAGES = {"lacre": "sdk", "lacre_fabric": "fabric", "lacre_gateway": "gateway", "lacre_backend": "backend"}
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+?)(?:\s*;.*)?(?:\s*\\)?$", re.MULTILINE)
_LOCKS = ("base.lock", "model.lock", "native.lock")  # what `.venv` is made from, as far as a running process needs it


@dataclass(frozen=True, slots=True)
class Version:
    """name: for people. sources: its tree. python: of the environment that its processes run in."""

    name: str
    sources: Path
    python: str

    def inside(self, *command: str) -> list[str]:
        """A command of this Python, as one of this version. The child itself checks where its modules lie."""
        module = command.index("-m")
        return [*self.running, *command[module + 1 :]]

    @property
    def running(self) -> list[str]:
        """What a module and its arguments are added to."""
        path = os.pathsep.join(str(self.sources / folder) for folder in PACKAGES.values())
        return ["env", f"PYTHONPATH={path}", self.python, "-P", str(WITHIN), str(self.sources)]

    def lacre(self, *arguments: str, status: int = 0, **variables: str) -> str:
        """What its `lacre` command says on its stdout."""
        command = [*self.running, "lacre", *arguments]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == status, (self.name, arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()


def environment() -> dict[str, str]:
    """Without what a person set for a `lacre` of his own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "PYTHONPATH"))}


def this() -> Version:
    return Version("new", ROOT, sys.executable)


def previous(cache: Path | None = None) -> Version:
    """cache: where its sources are kept. They are made if they are missing."""
    commit = named(NAMED.read_text())
    home = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacre" / "versions"
    sources = home / commit
    if not sources.exists():
        extract(ROOT, commit, sources)
    return Version("old", sources, _python(sources))


def named(text: str) -> str:
    commit = text.strip()
    assert re.fullmatch(r"[0-9a-f]{40}", commit), f"{NAMED.name} must name one commit by its 40 hexadecimal digits"
    return commit


def extract(repository: Path, commit: str, sources: Path) -> None:
    """Whole or not at all."""
    done = subprocess.run(
        ["git", "-C", str(repository), "archive", "--format=tar", commit],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (
        f"the history of this clone has no commit {commit}, the previous version: fetch it with `git fetch --unshallow`, "
        f"or `git fetch origin {commit}`. git says: {done.stderr.decode(errors='replace').strip()}"
    )
    sources.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sources.parent) as folder:
        beside = Path(folder) / "sources"
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(beside, filter="data")
        try:
            beside.rename(sources)
        except OSError:
            assert sources.exists()  # another process was quicker


def _pins(sources: Path) -> dict[str, set[str]]:
    """The versions of each package in its locks: there may be one for each Python and platform."""
    found: dict[str, set[str]] = {}
    for lock in _LOCKS:
        for name, version in _PIN.findall((sources / "requirements" / lock).read_text()):
            found.setdefault(name, set()).add(version)
    return found


def _fits(name: str, versions: set[str]) -> bool:
    """What is not installed at all is for another platform or Python: the locks are universal."""
    try:
        return metadata.version(name) in versions
    except metadata.PackageNotFoundError:
        return True


def _python(sources: Path) -> str:
    """This one, unless the previous version needs other packages than are here."""
    if all(_fits(name, versions) for name, versions in _pins(sources).items()):
        return sys.executable
    subprocess.run([sys.executable, str(sources / "tools" / "bootstrap.py")], check=True, env=environment())
    return str(sources / ".venv" / "bin" / "python")
