"""Settings that a program writes and a person edits: what the person wrote stays, whatever the values hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre_fabric.operate import settings_files

EDITED = """# why this file is mine
pool = "default" # the one

drain = 7   # long answers

[nats] # ours
url = "nats://127.0.0.1:1" # moves
ca = "ca.pem"

[[models]]
name = "small"
# measured on a Tuesday
threads = 2 # not 3

[[models]]
name = "large"
path = "/m/large.gguf"

[mine]
note = 'kept'
"""


INLINE = "models = [{name = 'a', slots = 2}]\n[t]\nx = 1\n"
TABLES = "[[models]]\nname = 'a'\nslots = 2\n[t]\nx = 1\n"


def same(one: settings_files.Values, other: settings_files.Values) -> bool:
    return one.get("name") == other.get("name")


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.lists(st.text())))
def test_what_is_written_is_read(values: dict[str, object]) -> None:
    document = tomlkit.document()
    settings_files.update(document, values)
    assert tomllib.loads(tomlkit.dumps(document)) == values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.toml"


def test_only_what_differs_changes(path: Path) -> None:
    path.write_text(EDITED)
    settings_files.write(path, {"pool": "default", "nats": {"url": "nats://127.0.0.1:2"}}, {"drain": 5, "health": "health"})
    assert path.read_text() == EDITED.replace("127.0.0.1:1", "127.0.0.1:2")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_stays_one(path: Path) -> None:
    target = path.parent / "kept elsewhere" / "mine.toml"
    target.parent.mkdir()
    target.write_text("a = 1 # mine\n")
    path.symlink_to(target)
    settings_files.write(path, {"a": 2})
    assert path.is_symlink()
    assert target.read_text() == "a = 2 # mine\n"


def test_what_says_the_same_is_not_written(path: Path) -> None:
    path.write_text("a = 1\n")
    before = path.stat()
    settings_files.write(path, {"a": 1})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_table_keeps_its_own_lines_wherever_it_goes(path: Path) -> None:
    path.write_text(EDITED)
    document, new = settings_files.opened(path)
    gone = settings_files.set_tables(document, "models", [{"name": "new"}, {"name": "small"}], same)
    settings_files.save(path, document)
    text = path.read_text()
    assert not new and gone == [{"name": "large", "path": "/m/large.gguf"}]
    assert tomllib.loads(text)["models"] == [{"name": "new"}, {"name": "small", "threads": 2}]
    for line in ("# why this file is mine", "# measured on a Tuesday", "threads = 2 # not 3", "drain = 7   # long answers"):
        assert line in text


@pytest.mark.parametrize("form", [INLINE, TABLES])
def test_tables_in_either_form(path: Path, form: str) -> None:
    path.write_text(form)
    document, _ = settings_files.opened(path)
    settings_files.set_tables(document, "models", [{"name": "b"}, {"name": "a"}], same)
    settings_files.save(path, document)
    assert tomllib.loads(path.read_text()) == {"models": [{"name": "b"}, {"name": "a", "slots": 2}], "t": {"x": 1}}


@pytest.mark.parametrize("content", [b"a = ", b"\xff", b"a = 1\na = 2", b"a = \x00"])
def test_a_damaged_file_stays(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="damaged"):
        settings_files.write(path, {"a": 1})
    assert path.read_bytes() == content


def test_a_path_that_is_not_unicode(path: Path) -> None:
    with pytest.raises(SettingsError, match="not UTF-8"):
        settings_files.write(path, {"a": "/home/jos\udce9"})
    assert not path.exists()
