"""The checksum in the files that `lacre model` writes: it changes nothing else, and no changed byte passes."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.weights import commands
from lacre_backend.models import checksum
from lacre_backend.models.gguf import find
from lacre_backend.workshop.adapter_inspection import INSPECT_FILE, FileAsked
from lacre_backend.workshop.child import run
from lacre_backend.workshop.inspection import InspectAsked
from lacre_backend.workshop.quantization import QUANTIZE, QuantizeAsked, quantize
from lacre_backend.workshop.rewriting import Rewriting, rewrite
from parts.tiny_model import tiny_model

HEAD: Final = 400  # bytes, of which each is tried; the checksum is within them
STEP: Final = 4999  # bytes of the rest between two that are tried


def silent(_what: str, _share: float) -> None: ...


def contents(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The metadata without the checksum, and the bytes of each tensor, read by another library."""
    reader = gguf.GGUFReader(path)
    own = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(("GGUF.", "lacre."))}
    return own, {tensor.name: bytes(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("more", [{}, {"general.alignment": 64}, {"a" * 7: "b"}, {"a" * 23: "b"}], ids=str)
def test_nothing_else_changes(tmp_path: Path, more: dict[str, Any]) -> None:
    """Whatever is in front of the tensors and however they are aligned. A second time it only computes anew."""
    path = tiny_model(tmp_path / "m.gguf", more=more)
    before = contents(path)
    assert not find(path).digests.checked
    for _ in range(2):
        checksum.write(path)
        assert contents(path) == before
        assert find(path).digests.checked
    size, digits = (gguf.GGUFReader(path).fields[f"lacre.file.{name}"].contents() for name in ("bytes", "sha256"))
    zeroed = path.read_bytes().replace(digits.encode(), b"0" * 64)
    (tmp_path / "zeroed").write_bytes(zeroed)
    assert (size, digits) == (path.stat().st_size, hashlib.sha256(zeroed).hexdigest())


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf")
    checksum.write(path)
    data = bytearray(path.read_bytes())
    for place in (*range(HEAD), *range(HEAD, len(data), STEP), len(data) - 1):
        data[place] ^= 0x20
        path.write_bytes(data)
        with pytest.raises(SettingsError, match=r"m\.gguf"):
            find(path)
        data[place] ^= 0x20
    path.write_bytes(data)
    assert find(path).digests.checked


def test_a_file_that_another_program_made_of_it_has_none(tmp_path: Path) -> None:
    """Such a program copies the metadata, and the checksum of the other file with it."""
    path = tiny_model(tmp_path / "m.gguf")
    checksum.write(path)
    copied = bytearray(path.read_bytes() + bytes(32))
    path.write_bytes(copied)
    assert not find(path).digests.checked
    checksum.write(path)
    assert find(path).digests.checked


def test_what_takes_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
    with pytest.raises(SettingsError, match="not a usable GGUF file"):
        checksum.write(path)
    moved = tiny_model(tmp_path / "moved.gguf", more={"lacre.file.sha256": "0" * 64})
    with pytest.raises(SettingsError, match="in an unexpected place"):
        checksum.write(moved)


def test_what_llama_cpp_writes_gets_its_own(tmp_path: Path) -> None:
    """It copies the source's."""
    source = tiny_model(tmp_path / "m.gguf")
    checksum.write(source)
    out = tmp_path / "out.gguf"
    for wanted in (Rewriting("Q8_0"), Rewriting(None, without=[1])):
        rewrite(source, out, wanted, lambda _share: None)
        assert find(out).digests.checked
    inspected = run(INSPECT_FILE, FileAsked(InspectAsked(out))).model
    assert inspected is not None
    assert inspected.checked


Step = Callable[[Path, Path], list[str]]
STEPS: Final[dict[str, Step]] = {
    "quantize": lambda model, folder: ["quantize", str(model), "--type", "Q8_0", "--out", str(folder / "out")],
    "prune": lambda model, folder: ["prune", str(model), "--drop", "1", "--out", str(folder / "out")],
    "compare": lambda model, folder: ["compare", str(model), str(model)],
    "sign": lambda model, folder: ["sign", str(model), "--key", str(folder / "key.pem")],
    "seal": lambda model, folder: ["seal", str(model), "--out", str(folder / "out"), "--kms", f"file:{folder / 'kms'}"],
    "verify": lambda model, folder: ["verify", str(model), "--key", str(folder / "key.pub")],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and a key."""
    checksum.write(tiny_model(tmp_path / "m.gguf"))
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").touch(0o600)
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", STEPS)
def test_each_command_refuses_a_changed_file(folder: Path, name: str) -> None:
    model = folder / "m.gguf"
    data = bytearray(model.read_bytes())
    data[-STEP] ^= 1
    model.write_bytes(data)
    (folder / "m.gguf.sig").write_bytes(b"{}")
    before = left(folder)
    failed = CliRunner().invoke(commands, STEPS[name](model, folder))
    assert isinstance(failed.exception, SettingsError)
    assert "changed since `lacre model` wrote it" in str(failed.exception)
    assert left(folder) == before


@pytest.mark.parametrize("name", ["sign", "seal"])
def test_a_file_that_is_cut_off_is_neither_signed_nor_sealed(folder: Path, name: str) -> None:
    """Its size is not what its checksum says, as if another program had made it."""
    model = folder / "m.gguf"
    model.write_bytes(model.read_bytes()[:-STEP])
    before = left(folder)
    failed = CliRunner().invoke(commands, STEPS[name](model, folder))
    assert "is cut off" in str(failed.exception)
    assert left(folder) == before


@pytest.mark.parametrize("signer", [(), ("--signer", "key.pub")], ids=["whoever signed", "by a key"])
def test_a_signed_file_is_sealed_only_as_it_was_signed(folder: Path, signer: tuple[str, ...]) -> None:
    model, options = folder / "m.gguf", [*signer[:1], *(str(folder / name) for name in signer[1:])]
    assert CliRunner().invoke(commands, STEPS["sign"](model, folder)).exit_code == 0
    shutil.copy(model, folder / "copy.gguf")
    tiny_model(model, seed=2)
    failed = CliRunner().invoke(commands, [*STEPS["seal"](model, folder), *options])
    assert "m.gguf: the model differs from the signed one" in str(failed.exception)
    assert not (folder / "out").exists()
    shutil.copy(folder / "copy.gguf", model)
    done = CliRunner().invoke(commands, [*STEPS["seal"](model, folder), *options])
    assert done.exit_code == 0, done.exception


def test_a_signature_is_asked_for(folder: Path) -> None:
    seal = [*STEPS["seal"](folder / "m.gguf", folder), "--signer", str(folder / "key.pub")]
    assert "has no signature" in str(CliRunner().invoke(commands, seal).exception)
    other = ec.generate_private_key(ec.SECP256R1())
    (folder / "key.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert CliRunner().invoke(commands, STEPS["sign"](folder / "m.gguf", folder)).exit_code == 0
    assert "by no key that is trusted here" in str(CliRunner().invoke(commands, seal).exception)


def test_a_key_that_others_can_read_signs_nothing(folder: Path) -> None:
    (folder / "key.pem").chmod(0o640)
    failed = CliRunner().invoke(commands, STEPS["sign"](folder / "m.gguf", folder))
    assert "can be read by others (mode 0640): chmod 600" in str(failed.exception)
    assert not (folder / "m.gguf.sig").exists()


@pytest.mark.usefixtures("one_core")
def test_a_source_without_a_checksum_is_said_to_be_unchecked(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The river rises above the town. " * 10)
    asked = QuantizeAsked(tiny_model(tmp_path / "m.gguf"), tmp_path / "out.gguf", ("Q8_0",), text=text)
    assert not quantize(asked, silent).checked
    checksum.write(asked.path)
    assert quantize(asked, silent).checked
    assert run(QUANTIZE, asked).checked
