"""Private files, locks between processes, and JSON objects from elsewhere: each has one reader or writer."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import InvalidMessage, SettingsError
from lacre.runtime import file_locks, private_files
from lacre.runtime.json_objects import object_in, parse_object


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("write", [private_files.replace, private_files.create])
def test_a_file_is_private_and_a_created_one_takes_nobody_s_place(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "secret"
    if write is private_files.replace:
        path.write_bytes(b"old")
        path.chmod(0o644)
    write(path, bytearray(b"new"))
    with pytest.raises(FileExistsError):
        private_files.create(path, b"another")
    assert (path.read_bytes(), mode_of(path), list(tmp_path.iterdir())) == (b"new", 0o600, [path])
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "secret", b"x")


def test_what_was_begun_is_discarded(tmp_path: Path) -> None:
    """A folder in the place cannot be replaced: the writer discards its own file, by the caller's means."""
    path, discarded = tmp_path / "taken", list[bytes]()
    path.mkdir()

    def discard(begun: Path) -> None:
        discarded.append(begun.read_bytes())
        begun.unlink()

    with pytest.raises(OSError, match="taken"):
        private_files.replace(path, b"secret", discard)
    assert (discarded, list(tmp_path.iterdir())) == ([b"secret"], [path])


@pytest.mark.parametrize(("mode", "private"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False), (0o610, False)])
def test_who_can_read_it(tmp_path: Path, mode: int, private: bool) -> None:
    path = tmp_path / "it is"
    path.touch()
    path.chmod(mode)
    told = pytest.raises(SettingsError, match=rf"mode {mode:04o}\): chmod 600 '")
    with contextlib.nullcontext() if private else told:
        private_files.check(path, path.stat().st_mode)


def test_opened_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with open(tmp_path / "new", "xb", opener=private_files.opener):
            pass
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new") == 0o600


ELSEWHERE = """
import sys
from pathlib import Path
from lacre.runtime import file_locks
print(file_locks.attempt(Path(sys.argv[1])) is None)
"""


def test_one_process_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def taken_elsewhere() -> str:
        command = [sys.executable, "-P", "-c", ELSEWHERE, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    lock = file_locks.take(path, "busy")
    assert taken_elsewhere() == "True"
    with pytest.raises(SettingsError, match="busy"), file_locks.held(path, "busy"):
        pass
    lock.release()
    assert taken_elsewhere() == "False"
    with file_locks.held(path, "busy"):
        assert file_locks.attempt(path) is None
    assert path.exists() and mode_of(path) == 0o600


def test_a_json_object() -> None:
    assert parse_object(b'{"a": 1, "a": 2}', "it") == {"a": 2}
    assert object_in(bytearray(b"{}")) == {}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        *((data, "is not JSON") for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1} {}')),
        *((data, "is not a JSON object") for data in (b"[]", b"null", b'"a"', b"1")),
    ],
)
def test_what_is_no_object(data: bytes, told: str) -> None:
    with pytest.raises(InvalidMessage, match=rf"^the answer {told}$"):
        parse_object(data, "the answer")
    assert object_in(data) is None


@pytest.mark.parametrize("data", [b'{"a": 1, "a": 1}', b'{"a": [{"b": 1, "b": 2}]}'])
def test_members_that_are_named_twice(data: bytes) -> None:
    with pytest.raises(InvalidMessage, match="repeats a member"):
        parse_object(data, "it", once=True)
