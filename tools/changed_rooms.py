"""Which heavy suites CI has to run: those of which a room changed in the commits of the last day.

Prints their names on one line. tests/heavy/suites.toml says what each one's rooms are. The last day is the one before the
newest commit, so that the answer is the same whenever it is asked. Where the history does not reach back that far, as in a
clone of depth 1 or a folder without git, nothing is known, and all of them run.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DAY: Final = 24 * 60 * 60  # seconds
SUITES: Final = "tests/heavy/suites.toml"
# What each suite is run by: rooms of all of them.
SHARED: Final = (SUITES, "tests/heavy/conftest.py", "tools/environments.py", "tools/changed_rooms.py", "requirements/base.lock")


def suites(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """Each suite's rooms, with its own folder and what all share."""
    told = tomllib.loads((root / SUITES).read_text(encoding="utf-8"))
    return {name: (*suite["rooms"], f"tests/heavy/{name}", *SHARED) for name, suite in told.items()}


def changed(root: Path = ROOT) -> frozenset[str] | None:
    """The paths that differ from how they were a day before the newest commit. None: it is not known."""
    try:
        newest = int(_git(root, "log", "-1", "--format=%ct"))
        # By the first parents: what a merge brought changed with the merge, however old its commits are.
        before = _git(root, "rev-list", "-1", "--first-parent", f"--before={newest - DAY}", "HEAD").strip()
        if not before:
            return None
        listed = _git(root, "diff", "--name-only", "--no-renames", "-z", before, "HEAD")
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return frozenset(listed.rstrip("\0").split("\0"))


def touched(suites: dict[str, tuple[str, ...]], paths: Iterable[str] | None) -> list[str]:
    """The suites of which a room has one of the paths in it; all where these are None."""
    if paths is None:
        return sorted(suites)
    above = {str(each) for path in paths for each in (Path(path), *Path(path).parents)}
    return sorted(name for name, rooms in suites.items() if not above.isdisjoint(rooms))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True)
    return done.stdout.decode(errors="surrogateescape")


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may run this file
        raise SystemExit("changed_rooms.py needs Python 3.11 or newer")
    print(*touched(suites(), changed()))
