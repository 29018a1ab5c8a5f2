"""Settings that a program writes and a person edits: what the person wrote stays. And which models `lacre up` serves."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre_fabric.operate import served_models, settings_files
from lacre_fabric.operate.site import Site
from lacre_fabric.work import model_names

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


# Which models `lacre up` serves, under which ids, and what becomes of those that it does not serve now.


IDS = {
    "SmolLM2-135M-Instruct-Q4_1.gguf": "smollm2-135m-instruct-q4_1",
    "My Model (Q4).gguf": "my-model-q4",
    "-rf.gguf": "rf",
    "a#b%20c?d&e.gguf": "a-b-20c-d-e",
    "José.gguf": "jose",
    "two\nlines.gguf": "two-lines",
    "llama3.1:8b.gguf": "llama3.1:8b",
    ".gguf": "gguf",
    "My Model (Q4)-00002-of-00003.gguf": "my-model-q4",
}


@pytest.mark.parametrize(("file", "name"), IDS.items())
def test_an_id_from_a_files_name(file: str, name: str) -> None:
    assert model_names.from_file(Path("/models") / file) == name


@given(
    st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=300).filter(lambda name: name not in (".", ".."))
)
def test_any_files_name_gives_an_id_that_a_url_holds(name: str) -> None:
    found = model_names.from_file(Path("/models") / f"{name}.gguf")
    assert re.fullmatch(model_names.PATTERN, found)
    assert re.fullmatch(r"[a-z0-9][a-z0-9._~+@:=-]*", found)


def test_letters_beyond_ascii_do_not_fall_together() -> None:
    names = {model_names.from_file(Path(f"{stem}.gguf")) for stem in ("模型", "型模", "Qwen 模", "Qwen 型", "Qwen")}
    assert len(names) == 5


def test_two_files_with_one_id_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "My Model.gguf", tmp_path / "b" / "my-model.gguf"]
    with pytest.raises(SettingsError, match="would share the id my-model") as error:
        served_models.chosen(tmp_path / "worker.toml", files)
    assert all(str(file) in str(error.value) for file in files)
    assert served_models.chosen(tmp_path / "worker.toml", [files[0], files[0]]).names == ("my-model",), (
        "the same file twice is one"
    )


def serve(site: Site, *models: str) -> tuple[str, ...]:
    served = served_models.chosen(site.worker_settings("default"), [Path(model) for model in models])
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": served.tables})
    return served.names


def edited(site: Site, old: str, new: str) -> Path:
    """The worker's settings, in which a person wrote something."""
    path = site.worker_settings("default")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def tables(site: Site) -> list[dict[str, object]]:
    return tomllib.loads(site.worker_settings("default").read_text())["models"]  # type: ignore[no-any-return]


def test_without_a_choice_what_was_served_is_served_again(site: Site) -> None:
    assert serve(site) == ("smollm2-135m",)
    assert serve(site, "/m/A.gguf", "/m/B.gguf") == ("a", "b")
    assert serve(site) == ("a", "b")
    assert tables(site) == [{"name": "a", "path": "/m/A.gguf"}, {"name": "b", "path": "/m/B.gguf"}]


def test_what_was_set_for_a_model_waits_while_it_is_not_served(site: Site) -> None:
    serve(site, "/m/A.gguf", "/m/B.gguf")
    edited(site, 'name = "a"', 'name = "a"\nthreads = 3')
    assert serve(site, "/m/B.gguf") == ("b",)
    assert serve(site, "/m/C.gguf") == ("c",)
    assert tables(site) == [{"name": "c", "path": "/m/C.gguf"}]
    assert serve(site, "/m/C.gguf", "/m/A.gguf") == ("c", "a")
    assert tables(site)[1] == {"name": "a", "path": "/m/A.gguf", "threads": 3}


def test_a_persons_own_id_stays_and_waits_while_its_model_is_not_served(site: Site, tmp_path: Path) -> None:
    """It says no more than an id and a place, and is known by neither of the names that would be derived."""
    serve(site, "/m/A.gguf", "/m/B.gguf")
    path = site.worker_settings("default")
    own = os.path.relpath("/m/A.gguf", path.parent)
    path.write_text(path.read_text().replace('name = "a"\npath = "/m/A.gguf"', f'name = "house"\npath = "{own}"'))
    assert serve(site) == ("house", "b")
    assert serve(site, "/m/B.gguf") == ("b",)
    assert serve(site, "/m/A.gguf") == ("house",)
    assert tables(site) == [{"name": "house", "path": own}]
    assert not tomllib.loads(path.with_name("set-aside.toml").read_text()).get("models"), "what says nothing does not wait"


def test_an_id_that_no_worker_takes_is_derived_anew(site: Site) -> None:
    """As older versions wrote it."""
    serve(site, "/m/A.gguf")
    edited(site, 'name = "a"\npath = "/m/A.gguf"', 'name = "b c"\npath = "/m/B C.gguf"\nslots = 2')
    assert serve(site) == ("b-c",)
    assert tables(site) == [{"name": "b-c", "path": "/m/B C.gguf", "slots": 2}]


def test_signers_stay_with_a_model(site: Site) -> None:
    """Once demanded, a signature is demanded at every start, and after the model was not served for a while."""
    path, demanded = site.worker_settings("default"), {"signers": ["/k/pub.pem"], "require_signature": True}
    served = served_models.chosen(path, [Path("/m/A.gguf")], [Path("/k/pub.pem")])
    assert served.tables == ({"name": "a", "path": "/m/A.gguf", **demanded},)
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": served.tables})
    serve(site, "/m/B.gguf")
    for again in (served_models.chosen(path, [Path("/m/A.gguf")]).tables, served.tables):
        assert served_models.planned(path, again) == [{"name": "a", "path": "/m/A.gguf", **demanded}]
    serve(site, "/m/A.gguf")
    assert tables(site) == [{"name": "a", "path": "/m/A.gguf", **demanded}]


def test_a_projector_stays_with_its_model(site: Site) -> None:
    path, own = site.worker_settings("default"), {"name": "a", "path": "/m/A.gguf", "projector": "/m/mmproj.gguf"}
    served = served_models.chosen(path, [Path("/m/A.gguf")], projector=Path("/m/mmproj.gguf"))
    assert (served.names, served.tables) == (("a",), (own,))
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": served.tables})
    serve(site, "/m/B.gguf")
    serve(site, "/m/A.gguf")
    assert tables(site) == [own]
    with pytest.raises(SettingsError, match="--projector is for one model, and 2 are served"):
        served_models.chosen(path, [Path("/m/A.gguf"), Path("/m/B.gguf")], projector=Path("/m/mmproj.gguf"))


def test_a_link_gives_a_file_another_id(site: Site, tmp_path: Path) -> None:
    """As in a store that calls files by their digests."""
    links = [tmp_path / "Qwen.gguf", tmp_path / "Other.gguf"]
    for link in links:
        link.symlink_to("/blobs/0123abcd")
    assert serve(site, *map(str, links)) == ("qwen", "other")


def test_an_upstream_of_a_persons_own_stays(site: Site) -> None:
    serve(site)
    path = site.worker_settings("default")
    upstream = '[upstream]\norigin = "http://127.0.0.1:9"\n[[upstream.models]]\nname = "big"\nallow = ["POST /x"]\n'
    path.write_text(path.read_text().partition("[[models]]")[0] + upstream)
    assert serve(site) == ("big",)
    assert "models" not in tomllib.loads(path.read_text())
    with pytest.raises(SettingsError, match="omit --model"):
        served_models.chosen(path, [Path("/m/A.gguf")])
    with pytest.raises(SettingsError, match="and --projector, or remove that table"):
        served_models.chosen(path, [], projector=Path("/m/mmproj.gguf"))
