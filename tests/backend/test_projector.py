"""Models that read images: which projectors a worker takes. tests/heavy/projector says what a picture does to an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from lacre.errors import SettingsError
from lacre_backend.commands.digests import PlannedModels, served_files
from lacre_backend.engine import projector as projectors
from lacre_backend.engine.adapted import adapted_digest
from lacre_backend.engine.projector import check
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models import signatures
from lacre_backend.models.gguf import FileDigests
from lacre_backend.models.signatures import UntrustedModel
from lacre_backend.settings import ModelSettings
from parts.tiny_model import N_EMBD, tiny_lora, tiny_model
from parts.tiny_projector import file_at, has_mtmd, projecting, tiny_projector


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", n_ctx=512)


# The file


def test_a_projector_is_told_by_its_head(tmp_path: Path, base: Path) -> None:
    check(file_at(tiny_projector(tmp_path / "own.gguf")), base)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"general.architecture": "llama"}, "not a projector"),
        ({"clip.has_vision_encoder": False}, "no vision encoder"),
        ({"clip.has_vision_encoder": 1}, "no vision encoder"),
        ({"clip.has_vision_encoder": False, "clip.has_audio_encoder": True}, "audio alone"),
        ({"clip.vision.projection_dim": N_EMBD + 1}, "states of 65 numbers, and those of tiny.gguf have 64"),
        ({"clip.vision.patch_size": 0}, "patch_size is 0"),
        ({"clip.vision.image_size": 2**20}, "image_size is 1048576"),
        ({"clip.vision.attention.head_count": 0}, "head_count is 0"),
    ],
    ids=["a model", "blind", "of another type", "audio", "of another model", "no patch", "huge", "no head"],
)
def test_another_file_is_refused_by_its_head(tmp_path: Path, base: Path, more: dict[str, Any], why: str) -> None:
    wrong = tiny_projector(tmp_path / "wrong.gguf", more=more)
    with pytest.raises(SettingsError, match=why) as refused:
        check(file_at(wrong), base)
    assert str(wrong) in str(refused.value) and "--mmproj" in str(refused.value)


def test_a_model_is_no_projector(base: Path) -> None:
    with pytest.raises(SettingsError, match="architecture is llama"):
        check(file_at(base), base)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, base: Path, kept: float) -> None:
    whole = tiny_projector(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(SettingsError, match="cannot be used"):
        check(file_at(cut), base)


@pytest.mark.skipif(has_mtmd(), reason="this llama-cpp-python has mtmd")
def test_a_worker_without_mtmd_says_what_to_install(tmp_path: Path, base: Path) -> None:
    with pytest.raises(SettingsError, match="make projector"):
        load_engine(projecting(base, tiny_projector(tmp_path / "own.gguf")))


def test_a_model_that_embeds_takes_none(tmp_path: Path) -> None:
    embedder = tiny_model(tmp_path / "embeds.gguf", embeds=True)
    with pytest.raises(SettingsError, match="remove `projector`"):
        load_engine(projecting(embedder, tiny_projector(tmp_path / "own.gguf")))


def test_the_manifest_has_the_digest_of_both_and_what_the_model_reads(tmp_path: Path, base: Path) -> None:
    projector, adapter = tiny_projector(tmp_path / "own.gguf"), tiny_lora(tmp_path / "lora.gguf")
    planned = PlannedModels(
        models=(projecting(base, projector, adapters={"lora": adapter}), ModelSettings(path=base, name="text"))
    )
    entries = served_files(planned)
    alone, own = (f"sha256:{FileDigests.read([path]).model}" for path in (base, projector))
    lora = f"sha256:{FileDigests.read([adapter]).model}"
    both = adapted_digest(alone, own)
    assert [f"sha256:{entries[name].sha256[0]}" for name in ("text", "tiny", "tiny:lora")] == [
        alone, both, adapted_digest(both, lora),
    ]  # fmt: skip
    assert [entries[name].modalities for name in ("text", "tiny", "tiny:lora")] == [
        ("text",), ("text", "image"), ("text", "image"),
    ]  # fmt: skip


def test_a_projector_of_another_model_reaches_no_manifest(tmp_path: Path, base: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be used"):
        served_files(PlannedModels(models=(projecting(base, tiny_projector(tmp_path / "other.gguf", n_embd=32)),)))


def test_a_projector_is_signed_as_its_model(tmp_path: Path, base: Path) -> None:
    projector, key = tiny_projector(tmp_path / "own.gguf"), ec.generate_private_key(ec.SECP256R1())
    public = tmp_path / "signer.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    signed = PlannedModels(models=(projecting(base, projector, signers=(public,)),))

    def sign(path: Path) -> None:
        signatures.signature_path(path).write_bytes(signatures.sign(FileDigests.read([path]), path.name, key))

    sign(base)
    with pytest.raises(UntrustedModel, match=r"own\.gguf"):
        served_files(signed)
    with pytest.raises(UntrustedModel, match=r"own\.gguf"):
        load_engine(signed.models[0])
    sign(projector)
    assert served_files(signed)["tiny"].signers == (signatures.signer_id(key.public_key()),)


def test_a_library_that_is_missing_is_told(tmp_path: Path) -> None:
    assert projectors.INSTALL in _missing(tmp_path)


def _missing(tmp_path: Path) -> str:
    """What a process says whose llama-cpp-python has no mtmd."""
    code = "from lacre_backend.engine.projector import mtmd\ntry:\n mtmd()\nexcept Exception as e:\n print(type(e).__name__, e)"
    child = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | {"MTMD_CPP_LIB": str(tmp_path)}, capture_output=True, check=True
    )
    return child.stdout.decode()
