"""Which heavy suites CI runs, asked of real git repositories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import changed_rooms

ROOT: Final = Path(__file__).resolve().parent.parent
NOON: Final = 1_700_000_000
HOUR: Final = 3600
SUITES: Final = {"one": ("room/one", "a file.lock"), "two": ("room/two",)}


class Repository:
    """A real one, whose commits have the times that they are given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, at: int = NOON) -> None:
        time = f"{at} +0000"
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"GIT_AUTHOR_DATE": time, "GIT_COMMITTER_DATE": time, "GIT_CONFIG_GLOBAL": os.devnull}
        who = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", self.root, *who, *arguments], check=True, env=env, capture_output=True)

    def commit(self, path: str, hours: int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{hours}")
        self.git("add", ".")
        self.git("commit", "-q", "-m", path, at=NOON + hours * HOUR)

    def touched(self) -> list[str]:
        told: list[str] = changed_rooms.touched(SUITES, changed_rooms.changed(self.root))
        return told


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "clone")
    made.commit("room/one/old.py", 0)
    made.commit("elsewhere.py", 1)
    return made


# After how many hours a file changed or git was called, and whose rooms that touched.
CHANGES: dict[str, tuple[list[tuple[int, str]], list[str]]] = {
    "nothing of theirs": ([(30, "room/onetime.py")], []),
    "a room": ([(30, "room/two/deep/down.py")], ["two"]),
    "a file that is a room": ([(30, "a file.lock")], ["one"]),
    "the whole last day and no more": ([(6, "room/two/early.py"), (31, "room/one/late.py"), (54, "elsewhere.py")], ["one"]),
    "letters beyond ASCII": ([(30, "room/one/olá\n🌊.py")], ["one"]),
    "what went counts too": ([(30, "git rm -q room/one/old.py"), (30, "git commit -q -m Away")], ["one"]),
    "what moved changed both rooms": ([(30, "git mv room/one/old.py room/two.py"), (30, "room/two/and.py")], ["one", "two"]),
    "an old branch merged today": (
        [(2, "git checkout -q -b side"), (2, "room/two/side.py"), (2, "git checkout -q main"), (40, "elsewhere.py"),
         (41, "git merge -q --no-ff -m Merge side")],
        ["two"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "touched"), CHANGES.values(), ids=CHANGES)
def test_what_changed(repository: Repository, changes: list[tuple[int, str]], touched: list[str]) -> None:
    for hours, what in changes:
        if what.startswith("git "):
            repository.git(*what.split()[1:], at=NOON + hours * HOUR)
        else:
            repository.commit(what, hours)
    assert repository.touched() == touched


class TestWhatIsNotKnown:
    """All of them run."""

    def test_no_git_or_no_commit(self, tmp_path: Path) -> None:
        assert changed_rooms.touched(SUITES, changed_rooms.changed(tmp_path)) == ["one", "two"]
        assert Repository(tmp_path / "empty").touched() == ["one", "two"]

    def test_a_history_that_does_not_reach_back(self, tmp_path: Path) -> None:
        young = Repository(tmp_path / "young")
        young.commit("elsewhere.py", 0)
        young.commit("elsewhere.py", 5)
        assert young.touched() == ["one", "two"]

    def test_a_clone_of_depth_one(self, repository: Repository, tmp_path: Path) -> None:
        repository.commit("elsewhere.py", 30)
        assert repository.touched() == []
        repository.git("clone", "-q", "--depth", "1", repository.root.as_uri(), str(tmp_path / "shallow"))
        assert changed_rooms.touched(SUITES, changed_rooms.changed(tmp_path / "shallow")) == ["one", "two"]


class TestThisProject:
    def test_its_rooms_are_there(self) -> None:
        for name, rooms in changed_rooms.suites().items():
            for room in rooms:
                assert (ROOT / room).exists(), f"tests/heavy/suites.toml: {name} has the room {room}, which is not there"

    def test_each_suite_has_its_rooms(self) -> None:
        folders = {path.parent.name for path in (ROOT / "tests/heavy").glob("*/test_*.py")}
        assert folders == set(changed_rooms.suites())

    def test_it_prints_names_of_suites(self) -> None:
        command = [sys.executable, "-P", ROOT / "tools/changed_rooms.py"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert set(done.stdout.split()) <= set(changed_rooms.suites())

    def test_ci_runs_what_it_prints(self) -> None:
        script = (ROOT / ".ci/run").read_text()
        assert "suites=$(python3 tools/changed_rooms.py)" in script and 'make test-heavy SUITES="$suites"' in script
