"""A checkpoint that is not what its publisher published: by a signature of its folder, or by the digests of Hugging Face."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from lacre.errors import InvalidMessage, SettingsError
from lacre_backend.commands.convert import commands
from lacre_backend.models import folders
from lacre_backend.models.checksum import DamagedModel
from lacre_backend.models.signatures import UntrustedModel
from lacre_backend.workshop.checkpoint import read_checkpoint
from lacre_backend.workshop.conversion import ConvertedType, convert_model
from lacre_backend.workshop.converter import ConverterPlace
from lacre_backend.workshop.published import CheckedSource, check_source
from parts.fake_converter import fake_checkpoint, fake_python, fake_sources
from parts.tiny_model import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, and two keys beside it."""
    for name in ("signer", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        (tmp_path / f"{name}.pem").touch(0o600)
        (tmp_path / f"{name}.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    made = fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf"))
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text('{"dimension": 8}')
    return made


def checked(folder: Path, *signers: str) -> CheckedSource:
    return check_source(read_checkpoint(folder), [folder.parent / f"{name}.pub" for name in signers])


def command(name: str, folder: Path, key: str) -> BaseException | None:
    return CliRunner().invoke(commands, [name, str(folder), "--key", str(folder.parent / key)]).exception


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def etag(path: Path) -> str:
    """As Hugging Face has it: weights are kept by their SHA-256, and text by git."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def downloaded(folder: Path) -> None:
    """With the metadata that `hf download --local-dir` leaves."""
    for name in names(folder):
        place = folder / ".cache/huggingface/download" / f"{name}.metadata"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{'a' * 40}\n{etag(folder / name)}\n1795961621.2\n")


def cached(folder: Path) -> None:
    """As in the cache of Hugging Face: a snapshot's files are links to blobs, each named by its digest."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for name in names(folder):
        blob = blobs / etag(folder / name)
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)


def test_without_a_signature_or_digests_everything_is_named_as_unchecked(folder: Path) -> None:
    found = checked(folder)
    assert (found.signed, found.signer, found.published) == (False, None, 0)
    assert {"model.safetensors", "config.json"} <= set(found.unchecked)


@pytest.mark.parametrize("way", [downloaded, cached])
def test_files_are_compared_with_what_hugging_face_published(folder: Path, way: Callable[[Path], None]) -> None:
    files, source = names(folder), read_checkpoint(folder)
    way(folder)
    assert checked(folder) == CheckedSource(published=len(files))
    for name in files:
        flip(folder / name)
        with pytest.raises(DamagedModel, match=f"{name} is not what Hugging Face published"):
            check_source(source, ())
        flip(folder / name)


def test_what_was_changed_on_purpose_is_told_how_to_say_so(folder: Path) -> None:
    downloaded(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    place = folder / ".cache/huggingface/download/config.json.metadata"
    with pytest.raises(DamagedModel, match=f"If you changed it on purpose, delete {place}"):
        checked(folder)
    place.unlink()
    assert checked(folder).unchecked == ["config.json"]


@pytest.mark.parametrize("said", ["", "one line", f"{'a' * 40}\nW/x\n1\n", "a\n" + "b" * 39 + "\n"], ids=range(4))
def test_metadata_of_another_form_is_no_digest(folder: Path, said: str) -> None:
    place = folder / ".cache/huggingface/download/config.json.metadata"
    place.parent.mkdir(parents=True)
    place.write_text(said)
    assert checked(folder).published == 0


def test_a_signed_folder_is_verified(folder: Path) -> None:
    assert command("sign", folder, "signer.pem") is None
    assert command("verify", folder, "signer.pub") is None
    assert isinstance(command("verify", folder, "other.pub"), UntrustedModel)
    assert (checked(folder).signed, checked(folder).signer) == (True, None)
    assert checked(folder, "other", "signer").signer is not None
    with pytest.raises(UntrustedModel, match="hf: the model's signature is by no key that is trusted here"):
        checked(folder, "other")
    source = read_checkpoint(folder)
    downloaded(folder)  # what Hugging Face's programs keep is no part of the model
    assert checked(folder, "signer").unchecked == []
    shutil.rmtree(folder / ".cache")
    for name in ("model.safetensors", "config.json", "1_Pooling/config.json"):
        flip(folder / name)
        with pytest.raises(UntrustedModel, match=f"its file '{name}' differs from the signed one"):
            check_source(source, ())
        flip(folder / name)


def test_a_file_that_came_or_went_is_noticed(folder: Path) -> None:
    command("sign", folder, "signer.pem")
    (folder / "more.json").write_text("{}")
    with pytest.raises(UntrustedModel, match=r"its file 'more\.json' differs"):
        checked(folder)
    (folder / "more.json").unlink()
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UntrustedModel, match=r"its file '1_Pooling/config\.json' differs"):
        checked(folder)


def test_a_signature_that_is_demanded_and_missing(folder: Path) -> None:
    with pytest.raises(UntrustedModel, match=r"hf has no signature: .*hf\.sig does not exist"):
        checked(folder, "signer")
    (folder.parent / "hf.sig").write_text("{}")
    with pytest.raises(InvalidMessage):
        checked(folder)


def test_folders_that_are_not_signed(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    assert "links are not signed" in str(command("sign", folder, "signer.pem"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="has no files"):
        folders.read(tmp_path / "empty")
    assert not (tmp_path / "hf.sig").exists()


def test_a_changed_source_is_not_converted(folder: Path, tmp_path: Path) -> None:
    command("sign", folder, "signer.pem")
    flip(folder / "model.safetensors")
    where = ConverterPlace(fake_python(tmp_path / "venv", "torch", "transformers"), fake_sources(tmp_path / "llama.cpp"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UntrustedModel):
        convert_model(folder, tmp_path / "out.gguf", ConvertedType.AUTO, where, lambda _what, _share: None)
    assert sorted(tmp_path.iterdir()) == before
