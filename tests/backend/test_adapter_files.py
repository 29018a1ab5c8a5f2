"""The files of adapters: what `lacre model inspect` says of them; signed, verified, sealed, and demanded so by the settings."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner, Result

from lacre.errors import SettingsError
from lacre_backend.commands.digests import served_files
from lacre_backend.commands.model import commands
from lacre_backend.engine.adapted import adapted_digest
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models.gguf import find
from lacre_backend.models.signatures import UntrustedModel, signer_id
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_backend.workshop.adapter_inspection import InspectedAdapter
from parts.tiny_model import tiny_lora, tiny_model

KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(commands, [*map(str, words)])


def told(*words: str | Path) -> dict[str, Any]:
    printed = command(*words, "--json")
    assert printed.exit_code == 0, printed.output or printed.exception
    answer: dict[str, Any] = json.loads(printed.stdout)
    return answer


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tiny_lora(tmp_path / "legal.gguf", rank=4, metadata={"adapter.lora.alpha": 8.0})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base.gguf")


def test_an_adapter_is_described(tmp_path: Path, lora: Path, base: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    found = told("inspect", lora)
    assert set(found) == {*InspectedAdapter.__slots__}
    assert (found["kind"], found["architecture"], found["name"]) == ("adapter", "llama", "legal")
    assert (found["rank"], found["alpha"], found["scale"], found["layers"]) == (4, 8, 2, 2)
    assert found["targets"] == ["attn_output", "attn_q", "attn_v"]
    assert found["digest"] == find(lora).digest
    assert found["fits"] == [str(base)]
    assert (found["sealed"], found["signature"], found["checked"]) == (None, None, False)
    table = command("inspect", lora).stdout
    assert "rank 4, alpha 8" in table
    assert str(base) in table


def test_why_it_does_not_fit_a_model(tmp_path: Path, lora: Path, base: Path) -> None:
    other = tiny_lora(tmp_path / "other.gguf", metadata={"general.architecture": "qwen2"})
    assert told("inspect", lora, "--base", base)["fits"] == [str(base)]
    found = told("inspect", other, "--base", base)
    assert found["fits"] == []
    assert "for the architecture qwen2, and base.gguf is llama" in found["reason"]
    assert "architecture qwen2, and" in command("inspect", other, "--base", base).stdout
    assert "No such model file" in told("inspect", lora, "--base", tmp_path / "absent.gguf")["reason"]
    assert "none of the models beside it" in command("inspect", other).stdout


def test_a_base_is_for_adapters_alone(lora: Path, base: Path) -> None:
    refused = command("inspect", base, "--base", lora)
    assert isinstance(refused.exception, SettingsError)
    assert "--base is for adapters" in str(refused.exception)
    assert told("inspect", base)["kind"] == "generate"


def test_an_adapter_that_is_cut_off(lora: Path) -> None:
    lora.write_bytes(lora.read_bytes()[:-100])
    refused = command("inspect", lora)
    assert isinstance(refused.exception, SettingsError)
    assert "is cut off" in str(refused.exception)


def key_files(folder: Path, name: str, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_signed_and_sealed_adapters_are_served_where_both_are_demanded(tmp_path: Path, lora: Path, base: Path) -> None:
    (private, public), (other, _) = key_files(tmp_path, "ours", KEY), key_files(tmp_path, "theirs", OTHER)
    kms = f"file:{tmp_path / 'kms'}"

    def sealed(path: Path) -> Path:
        told("seal", path, "--out", tmp_path / f"{path.stem}.sealed", "--kms", kms)
        return tmp_path / f"{path.stem}.sealed"

    def settings(adapter: Path) -> ModelSettings:
        conditions: dict[str, Any] = {"sealed": True, "signers": [public], "context": 256, "slots": 2, "threads": 1}
        return ModelSettings(path=tmp_path / "base.sealed", name="m", adapters={"legal": adapter}, **conditions)

    told("sign", base, "--key", private)
    sealed(base)
    with pytest.raises(UntrustedModel, match=r"legal\.sealed: .*no signature"):
        load_engine(settings(sealed(lora)), kms)
    told("sign", lora, "--key", other)
    with pytest.raises(UntrustedModel, match=r"legal\.sealed: "):
        load_engine(settings(sealed(lora)), kms)
    told("sign", lora, "--key", private)
    assert told("verify", lora, "--key", public)["digest"] == find(lora).digest
    with closing(load_engine(settings(sealed(lora)), kms)) as engine:
        assert engine.model.name == "m"
    entries = served_files(WorkerSettings.model_construct(models=(settings(tmp_path / "legal.sealed"),), kms=kms))
    both = adapted_digest(find(base).digest, find(lora).digest)
    assert entries["m:legal"].digests == (both,)
    assert entries["m:legal"].signers == (signer_id(KEY.public_key()),)
    found = told("inspect", tmp_path / "legal.sealed", "--kms", kms, "--base", base)
    assert (found["kind"], found["rank"], found["fits"], found["sealed"]) == ("adapter", 4, [str(base)], "by file:")
    assert signer_id(KEY.public_key()) in found["signature"]
    assert told("inspect", tmp_path / "legal.sealed")["digest"] == find(lora).digest


def test_a_sealed_adapter_that_does_not_fit_is_named(tmp_path: Path, base: Path) -> None:
    """At the start, and by `lacre worker digests`, which `lacre up` runs first."""
    kms, other = f"file:{tmp_path / 'kms'}", tiny_lora(tmp_path / "other.gguf", metadata={"general.architecture": "qwen2"})
    told("seal", other, "--out", tmp_path / "other.sealed", "--kms", kms)
    settings = ModelSettings(path=base, name="m", context=256, slots=2, adapters={"legal": tmp_path / "other.sealed"})
    with pytest.raises(SettingsError, match=r"The adapter .*/other\.sealed cannot be used: it is for the architecture qwen2"):
        load_engine(settings, kms)
    with pytest.raises(SettingsError, match=r"The adapter .*/other\.sealed cannot be used"):
        served_files(WorkerSettings.model_construct(models=(settings,), kms=kms))
