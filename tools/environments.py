"""Python environments beside `.venv`, one for each lock file in tests/ecosystem: other people's programs, and other Pythons.

`environments.py NAME...` makes those that are missing, all of them where no name is given, and prints each one's interpreter.
The heavy suites have lock files too (tests/heavy/SUITE); each of those is made only by its name.
Several are made at a time, by the pip of the interpreter that runs this: it waits for others more than it computes.
An environment is kept outside the clone (`$XDG_CACHE_HOME/lacre/environments`) under a name that says what it was made from,
so that a second run starts in seconds. It holds what its lock file lists, no pip, and no Lacre: that is the clone's, by
PYTHONPATH. Only what a test imports is compiled, by the first that does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
LOCKS = TESTS / "ecosystem"
HEAVY = TESTS / "heavy"
DECLARED = ("3.11", "3.12", "3.13")
FOR_EACH_PYTHON = ("gateway", "sdk")  # the others are made from the running one
AT_A_TIME = 4
# In no lock file: what it needs differs with the machine.
TORCH = "torch==2.13.0"


def folder() -> Path:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "lacre" / "environments"


def pythons() -> Iterator[Path]:
    """The interpreters of declared versions that are here, one of each: on PATH, or where pyenv keeps them."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in DECLARED:
        kept = sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
        on_path = shutil.which(f"python{version}")
        for candidate in [*([Path(on_path)] if on_path else []), *kept]:
            if _version(candidate) == version:
                yield candidate
                break


def _version(python: Path) -> str | None:
    """None for a name that starts no interpreter, as pyenv's shims are for versions that are not chosen."""
    code = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def ready(name: str, python: Path | None = None) -> Path:
    """The interpreter of the environment NAME, made now where there is none. python: what it is made from."""
    lock = lock_of(name)
    options = ("--require-hashes", "--no-deps", "--only-binary=:all:", "-r", str(lock))
    return _kept(name, lock.read_bytes(), python or Path(sys.executable), lambda home: _install(home, options))


def ready_with_torch(name: str) -> Path:
    """The same, with PyTorch: that is large, is installed once, and comes after all else on the path of each."""
    base = Path(sys.executable)
    torch = _packages(_kept("torch", TORCH.encode(), base, lambda home: _install(home, (TORCH,))))
    python = ready(name)
    (_packages(python) / "torch.pth").write_text(f"{torch}\n")
    return python


def _kept(name: str, made_from: bytes, base: Path, fill: Callable[[Path], None]) -> Path:
    """The interpreter of an environment that `fill` fills, once for what it is made from."""
    key = sha256(made_from + str(base.resolve()).encode()).hexdigest()[:16]
    home = folder() / f"{name}-{_version(base)}-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two test runs, or two clones, do not make the same one at a time
        if not (home / ".ready").exists():
            print(f"Making the environment {home.name}", file=sys.stderr, flush=True)
            subprocess.run([base, "-m", "venv", "--clear", "--without-pip", home], check=True)
            fill(home)
            (home / ".ready").touch()
    return home / "bin" / "python"


def _install(home: Path, options: tuple[str, ...]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-compile", *options], check=True)


def _packages(python: Path) -> Path:
    [found] = python.parent.parent.glob("lib/python*/site-packages")
    return found


def lock_of(name: str) -> Path:
    found = [*LOCKS.glob(f"{name}.lock"), *HEAVY.glob(f"*/{name}.lock")]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} lock files are named {name}.lock in tests/ecosystem and tests/heavy: there must be one")
    return found[0]


def names() -> list[str]:
    """Of those that `make environments` makes."""
    return sorted(lock.stem for lock in LOCKS.glob("*.lock"))


def main() -> None:
    wanted = [(name, python) for name in sys.argv[1:] or names() for python in _made_from(name)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for made in pool.map(lambda each: ready(*each), wanted):
            print(made)


def _made_from(name: str) -> list[Path | None]:
    return list(pythons()) if name in FOR_EACH_PYTHON else [None]


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failed:
        raise SystemExit(f"an environment is not set up: see above; this ended with status {failed.returncode}") from None
