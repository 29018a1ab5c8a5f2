"""Models encrypted at rest: the format, what is refused, and that an opened model is the same as the plain one."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from lacre.errors import LacreError, SettingsError
from lacre_backend.commands.model import commands
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan
from lacre_backend.engine.stream_file import stream_file
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models.chunked import CHUNK, ChunkedReader, SealedModelInvalid
from lacre_backend.models.gguf import find
from lacre_backend.models.opening import Conditions, open_model
from lacre_backend.models.sealed import MAGIC, read_head
from lacre_backend.models.signatures import SUFFIX, UntrustedModel, sign, signer_id
from lacre_backend.settings import ModelSettings
from lacre_backend.workshop.sealing import rewrap_model, seal_model
from lacre_fabric.keys.kms import KmsError, WrongWrapping
from parts.tiny_model import tiny_model, tiny_split_model

VECTORS = json.loads((files("cryptography_vectors") / "chunked-encryption" / "vectors.json").read_text())["vectors"]


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["aead"] == "AEAD_AES_256_GCM"], ids=lambda v: v["name"])
def test_vectors_of_the_specification(tmp_path: Path, vector: dict[str, Any]) -> None:
    """Its vectors have SHA-256 where Cobblestone-256 has SHA-512. Each is opened from several places, or refused."""
    message = base64.b64decode(vector["ciphertext"] or "")
    if vector.get("compressed"):
        message = zlib.decompress(message)
    path = tmp_path / "message"
    path.write_bytes(message)
    body = max(len(message) - 56, 0)
    size = max(body - 16 * (body // (CHUNK + 16) + 1), 0)
    with path.open("rb") as file:

        def read() -> bytes:
            key, context = bytes.fromhex(vector["key"]), vector["context"].encode()
            reader, text = ChunkedReader(file.fileno(), 0, size, key, context=context, algorithm=SHA256()), bytearray(size)
            reader.read_into(0, memoryview(text))
            for at in (0, size // 2, max(size - 1, 0)):
                part = bytearray(size - at)
                reader.read_into(at, memoryview(part))
                assert part == text[at:]
            return bytes(text)

        if vector["expect"] == "success":
            assert size == vector["payload_length"]
            assert hashlib.sha256(read()).hexdigest() == vector["payload_sha256"]
        else:
            with pytest.raises(SealedModelInvalid):
                read()


def kms(folder: Path, name: str = "kms") -> str:
    return f"file:{folder / name}"


def sealed(folder: Path, model: Path | None = None) -> Path:
    source = tiny_model(folder / "tiny.gguf") if model is None else model
    seal_model(source, folder / "tiny.sealed", kms(folder), lambda _what, _share: None)
    return folder / "tiny.sealed"


def logits_of(path: Path, address: str) -> tuple[str, list[float]]:
    opened = open_model(path, "m", Conditions(address))
    with closing(Tokenizer(opened.file.path)) as tokenizer:
        model = Model(
            opened.file.path,
            name="m",
            digest=opened.file.digest,
            n_ctx=64,
            gpu=Gpu(layers=0),
            tokenizer=tokenizer,
            weights=opened.weights,
        )
        limits = EngineLimits(slots=1, context=64, cells=64, unified=False, step=256)
        context = LlamaContext(model, limits, Compute(1, False))
        try:
            context.execute(StepPlan((), (Segment(0, 0, (4, 5, 6), None, True),), (), (), 0))
            return opened.file.digest, context.logits(1)[0].tolist()
        finally:
            context.free()


def test_an_opened_model_is_the_plain_one(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    plain, opened = logits_of(tmp_path / "tiny.gguf", kms(tmp_path)), logits_of(path, kms(tmp_path))
    assert opened == plain
    assert opened[0] == find(tmp_path / "tiny.gguf").digest


def test_nothing_of_the_model_is_in_the_sealed_file(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    plain, data = (tmp_path / "tiny.gguf").read_bytes(), path.read_bytes()
    assert not any(plain[at : at + 32] in data for at in range(0, len(plain) - 32, 1000))
    assert oct(path.stat().st_mode)[-3:] in {"644", "600"}


def record(head: int, number: int) -> int:
    return head + 56 + number * (CHUNK + 16)


def edited(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int) -> None:
    edited(path, at, bytes([path.read_bytes()[at] ^ 1]))


def swap(path: Path) -> None:
    at, data = read_head(path).at, path.read_bytes()
    first, second = (data[record(at, i) : record(at, i + 1)] for i in (3, 4))
    edited(path, record(at, 3), second + first)


def cut(path: Path) -> None:
    os.truncate(path, record(read_head(path).at, 5))


def rename(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"name":"tiny"', b'"name":"TINY"', 1))


BENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a chunk": (lambda path: flip(path, record(read_head(path).at, 7) + 5), "chunk 7 of the sealed model is damaged"),
    "a bit of the last chunk": (lambda path: flip(path, path.stat().st_size - 1), "is damaged or edited"),
    "two chunks swapped": (swap, "chunk 3 of the sealed model"),
    "cut at a chunk": (cut, "is cut off, or too long"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is cut off, or too long"),
    "the salt": (lambda path: flip(path, read_head(path).at), "its head was edited"),
    "the commitment": (lambda path: flip(path, read_head(path).at + 30), "its head was edited"),
    "the name": (rename, "its head was edited"),
    "a length": (lambda path: edited(path, len(MAGIC), b"\xff"), "head of the sealed model is damaged"),
    "only the magic": (lambda path: os.truncate(path, len(MAGIC)), "head of the sealed model is damaged"),
    "no JSON": (lambda path: edited(path, len(MAGIC) + 4, b"x"), "head of the sealed model is damaged"),
}


@pytest.mark.parametrize("name", BENT)
def test_bent_files_do_not_load(tmp_path: Path, name: str) -> None:
    bend, said = BENT[name]
    path = sealed(tmp_path)
    bend(path)
    with pytest.raises(SealedModelInvalid, match=said):
        logits_of(path, kms(tmp_path))


def test_the_key_must_be_the_right_one(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    (tmp_path / "tiny.gguf").rename(tmp_path / "other.gguf")
    seal_model(tmp_path / "other.gguf", tmp_path / "other.sealed", kms(tmp_path, "other"), lambda _what, _share: None)
    with pytest.raises(WrongWrapping):
        open_model(path, None, Conditions(kms(tmp_path, "other")))
    with pytest.raises(KmsError):
        open_model(path, None, Conditions(kms(tmp_path, "absent")))
    with pytest.raises(SettingsError, match=r"is sealed\. Give the address of the service"):
        open_model(path, None, Conditions())


def test_rewrapping_changes_who_opens_it(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    before = logits_of(path, kms(tmp_path))
    (tmp_path / "new").write_bytes(os.urandom(32))
    (tmp_path / "new").chmod(0o600)
    rewrap_model(path, kms(tmp_path), kms(tmp_path, "new"))
    assert logits_of(path, kms(tmp_path, "new")) == before
    with pytest.raises(WrongWrapping):
        open_model(path, None, Conditions(kms(tmp_path)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kms", "new", "tiny.gguf", "tiny.sealed"]


def test_what_cannot_be_sealed_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path, split = sealed(tmp_path), tiny_split_model(tmp_path)
    (tmp_path / "text").write_text("no model")
    before = sorted(tmp_path.iterdir())
    for source, out, said in (
        (path, tmp_path / "again", "sealed already"),
        (split[0], tmp_path / "again", "Merge them first.*--type COPY"),
        (tmp_path / "text", tmp_path / "again", "not a GGUF file"),
        (tmp_path / "absent", tmp_path / "again", "No such model file"),
        (tmp_path / "tiny.gguf", tmp_path / "tiny.gguf", "is the input itself"),
        (tmp_path / "tiny.gguf", tmp_path / "no" / "out", "does not exist"),
    ):
        with pytest.raises(LacreError, match=said):
            seal_model(source, out, kms(tmp_path), lambda _what, _share: None)
    with pytest.raises(SettingsError, match="wraps nothing"):
        seal_model(tmp_path / "tiny.gguf", tmp_path / "again", "plain:", lambda _what, _share: None)
    assert sorted(tmp_path.iterdir()) == before


KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def public(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_signature_is_demanded_and_travels_with_the_seal(tmp_path: Path, is_sealed: bool) -> None:
    model, trusted, other = tiny_model(tmp_path / "tiny.gguf"), public(tmp_path / "k", KEY), public(tmp_path / "o", OTHER)
    unsigned = sealed(tmp_path, model) if is_sealed else model
    with pytest.raises(UntrustedModel, match="has no signature"):
        open_model(unsigned, None, Conditions(kms(tmp_path), signers=[trusted]))
    model.with_name(model.name + SUFFIX).write_bytes(sign(find(model).digests, "tiny", KEY))
    signed = sealed(tmp_path, model) if is_sealed else model
    opened = open_model(signed, None, Conditions(kms(tmp_path), sealed=is_sealed, signers=[other, trusted]))
    assert opened.signer == signer_id(KEY.public_key())
    with pytest.raises(UntrustedModel, match="no key that is trusted"):
        open_model(signed, None, Conditions(kms(tmp_path), signers=[other]))


def test_settings_demand_sealed_files_and_name_signers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    with pytest.raises(SettingsError, match="`sealed = true` allows no plain model"):
        open_model(model, None, ModelSettings(path=model, sealed=True).conditions(kms(tmp_path)))
    with pytest.raises(ValueError, match="name the public keys"):
        ModelSettings(path=model, require_signature=True)


def test_all_that_reads_the_head_sees_the_model(tmp_path: Path) -> None:
    opened = open_model(sealed(tmp_path), None, Conditions(kms(tmp_path)))
    assert opened.file.name == "tiny"
    assert opened.file.path.stat().st_size == (tmp_path / "tiny.gguf").stat().st_size
    assert ModelMetadata.read(opened.file.path) == ModelMetadata.read(tmp_path / "tiny.gguf")


class Broken:
    size = 100

    def read_into(self, at: int, target: memoryview) -> None:
        raise OSError(5, "Input/output error")


def test_an_error_in_reading_reaches_the_caller_through_c() -> None:
    libc = ctypes.CDLL(None)
    libc.fread.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    with stream_file(Broken()) as stream:
        assert libc.fread(ctypes.create_string_buffer(10), 1, 10, stream.pointer) == 0
        assert isinstance(stream.error, OSError)


def test_the_commands(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    out = tmp_path / "tiny.sealed"
    told = CliRunner().invoke(commands, ["seal", str(model), "--out", str(out), "--kms", kms(tmp_path), "--json"])
    assert json.loads(told.stdout) == {"sealed": str(out), "name": "tiny", "digest": find(model).digest, "signed": False}
    again = CliRunner().invoke(commands, ["rewrap", str(out), "--kms", kms(tmp_path), "--to", kms(tmp_path)])
    assert again.exit_code == 0
    head = CliRunner().invoke(commands, ["inspect", str(out), "--json"])
    assert json.loads(head.stdout)["digest"] == find(model).digest
    whole = json.loads(CliRunner().invoke(commands, ["inspect", str(out), "--kms", kms(tmp_path), "--json"]).stdout)
    plain = json.loads(CliRunner().invoke(commands, ["inspect", str(model), "--json"]).stdout)
    same = {"digest", "bytes", "architecture", "types", "parameters", "vocabulary", "faults", "name"}
    assert {key: whole[key] for key in same} == {key: plain[key] for key in same}
    assert (whole["sealed"], plain["sealed"]) == ("by file:", None)
