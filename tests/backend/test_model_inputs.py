"""What is no model file, or no place for one: each command of `lacre model` says so, and writes nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tests.parts.tiny_model import TEMPLATE, tiny_lora, tiny_model, tiny_reranker, tiny_vocabulary, write_gguf
from typer.testing import CliRunner

from lacre.errors import LacreError, SettingsError
from lacre_backend.commands.measure import commands
from lacre_backend.workshop.adapter_inspection import INSPECT_FILE, FileAsked
from lacre_backend.workshop.benchmark import BENCH, BenchAsked
from lacre_backend.workshop.child import Report, run
from lacre_backend.workshop.choosing import LOOK, ChooseAsked, choose
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.examples import ModelTask
from lacre_backend.workshop.fidelity import read_text
from lacre_backend.workshop.inspection import InspectAsked, inspect
from lacre_backend.workshop.source import SourceModel

SILENT: Report = lambda _what, _share: None  # noqa: E731


def command(*words: object) -> None:
    done = CliRunner().invoke(commands, [*map(str, words)])
    if done.exception is not None:
        raise done.exception


def sealing(path: Path) -> None:
    command("seal", path, "--out", path.parent / "out", "--kms", "file:key")


# What reads the file: `SourceModel` for compare, quantize and prune. The others by their names.
READERS: Final[Mapping[str, Callable[[Path], object]]] = {
    "inspect": lambda path: INSPECT_FILE.work(FileAsked(InspectAsked(path)), SILENT),
    "bench": lambda path: BENCH.work(BenchAsked(path), SILENT),
    "measure": SourceModel.read,
    "sign": lambda path: command("sign", path, "--key", signing_key(path.parent)),
    "seal": sealing,
    "rewrap": lambda path: command("rewrap", path, "--kms", "file:key", "--to", "file:key"),
}


def signing_key(folder: Path) -> Path:
    key = folder / "key.pem"
    key.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key.chmod(0o600)
    return key


def absent(_path: Path) -> None:
    pass


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


WRONG: Final[Mapping[str, tuple[str, Callable[[Path], object], str]]] = {
    "absent": ("a.gguf", absent, "No such model file"),
    "a loop": ("a.gguf", link_to_itself, "No such model file"),
    "a pipe": ("a.gguf", os.mkfifo, "is a pipe or a device"),
    "a device": ("a.gguf", lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "another charset": ("caf\udce9.gguf", tiny_model, "is not UTF-8"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_read(tmp_path: Path, reader: str, wrong: str) -> None:
    name, make, said = WRONG[wrong]
    path = tmp_path / name
    make(path)
    with pytest.raises(SettingsError, match=said):
        READERS[reader](path)
    assert {each.name for each in tmp_path.iterdir()} <= {name, "key.pem"}


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"sign"}))  # it signs folders too
def test_a_folder_is_no_model(tmp_path: Path, reader: str) -> None:
    with pytest.raises(SettingsError, match="is a folder"):
        READERS[reader](tmp_path)


def test_what_is_no_model_beside_an_adapter_is_not_tried(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    tiny_model(tmp_path / "caf\udce9.gguf")
    model, lora = tiny_model(tmp_path / "model.gguf"), tiny_lora(tmp_path / "lora.gguf")
    found = INSPECT_FILE.work(FileAsked(InspectAsked(lora)), SILENT).adapter
    assert found is not None
    assert found.fits == [str(model)]
    found = INSPECT_FILE.work(FileAsked(InspectAsked(lora), tmp_path / "pipe.gguf"), SILENT).adapter
    assert found is not None
    assert "is a pipe or a device" in (found.reason or "")


def test_a_name_that_json_cannot_hold_is_told_before_the_child(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.gguf"
    tiny_model(path)
    with pytest.raises(SettingsError, match="is not UTF-8"):
        run(INSPECT_FILE, FileAsked(InspectAsked(path)))
    with pytest.raises(LacreError, match="is not UTF-8"):
        choose(ChooseAsked(tmp_path, ModelTask.CHAT, measure=False), SILENT)


def vocabulary_only(path: Path) -> Path:
    about = {"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE, "llama.context_length": 64}
    own = {"llama.embedding_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4}
    return write_gguf(path, about | own | {"llama.attention.layer_norm_rms_epsilon": 1e-5} | tiny_vocabulary("llama"), {})


def test_the_child_s_error_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o600)
    kms = f"file:{tmp_path / 'key'}"
    command("seal", tiny_model(tmp_path / "a.gguf"), "--out", tmp_path / "a.sealed", "--kms", kms)
    with (tmp_path / "a.sealed").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(SettingsError, match=r"is cut off.*\. Copy the sealed model again"):
        run(INSPECT_FILE, FileAsked(InspectAsked(tmp_path / "a.sealed", kms)))


def test_a_vocabulary_alone_is_shown_and_not_run(tmp_path: Path) -> None:
    path = vocabulary_only(tmp_path / "vocabulary.gguf")
    found = inspect(InspectAsked(path), SILENT)
    assert (found.node.fits, found.parameters) == (False, 0)
    assert "no weights" in (found.node.reason or "")
    for reader in ("bench", "measure"):
        with pytest.raises(SettingsError, match="no weights"):
            READERS[reader](path)
    looked = LOOK.work(ChooseAsked(path, ModelTask.CHAT), SILENT)
    assert not looked.suits
    assert "no weights" in (looked.reason or "")


def test_a_reranker_is_shown_as_one(tmp_path: Path) -> None:
    found = inspect(InspectAsked(tiny_reranker(tmp_path / "rank.gguf")), SILENT)
    assert (found.kind, found.node.fits, found.faults) == ("rerank", True, [])
    with pytest.raises(SettingsError, match="is a reranker"):
        READERS["bench"](tmp_path / "rank.gguf")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("out", os.mkfifo, "is a pipe or a device"),
        ("out", lambda path: path.symlink_to("/dev/null"), "is a pipe or a device"),
        ("out", os.mkdir, "is a folder"),
        ("caf\udce9", absent, "is not UTF-8"),
    ],
    ids=["a pipe", "a device", "a folder", "another charset"],
)
def test_what_is_no_place_for_a_file_is_not_replaced(
    tmp_path: Path, name: str, make: Callable[[Path], object], said: str
) -> None:
    """A rename over a device would leave every program of this machine without it."""
    make(tmp_path / name)
    before = [(each.name, each.lstat().st_ino) for each in tmp_path.iterdir()]
    with pytest.raises(SettingsError, match=said), draft(tmp_path / name, []):
        pytest.fail("it begins to write")
    assert [(each.name, each.lstat().st_ino) for each in tmp_path.iterdir()] == before


def test_a_file_that_becomes_too_large_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=re.escape(str(out))), draft(out, []) as path, path.open("wb"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert not list(tmp_path.iterdir())


def test_of_a_long_text_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("é" * 2**20)
    assert set(read_text(path)) == {"é"}
    assert 2**18 < len(read_text(path)) < 2**20
