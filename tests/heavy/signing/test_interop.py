"""PyPI's `model-signing` verifies our bundles, and we verify its: with each curve, and with a file that changed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from lacre_backend.commands.model import commands
from lacre_backend.models.signatures import SUFFIX, UntrustedModel
from parts.tiny_model import tiny_model

Theirs = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def theirs(environment: Callable[[str], str]) -> Theirs:
    """Runs their command."""
    python = environment("signing")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [python, "-P", "-m", "model_signing", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(params=[ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A private key's file, and its public one."""
    key = ec.generate_private_key(request.param)
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.touch(0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def change(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_they_verify_ours(tmp_path: Path, theirs: Theirs, keys: tuple[Path, Path]) -> None:
    model, (private, public) = tiny_model(tmp_path / "m.gguf"), keys
    assert CliRunner().invoke(commands, ["sign", str(model), "--key", str(private)]).exit_code == 0
    arguments = ("verify", "key", "--signature", f"{model}{SUFFIX}", "--public_key", public, model)
    verified = theirs(*arguments)
    assert verified.returncode == 0, verified.stderr
    change(model)
    assert theirs(*arguments).returncode != 0


def test_we_verify_theirs(tmp_path: Path, theirs: Theirs, keys: tuple[Path, Path]) -> None:
    model, (private, public) = tiny_model(tmp_path / "m.gguf"), keys
    signed = theirs("sign", "key", "--signature", f"{model}{SUFFIX}", "--private_key", private, model)
    assert signed.returncode == 0, signed.stderr
    ours = ["verify", str(model), "--key", str(public)]
    assert CliRunner().invoke(commands, ours).exit_code == 0
    change(model)
    assert isinstance(CliRunner().invoke(commands, ours).exception, UntrustedModel)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names whose order differs by text and by path; and what is no part of a model."""
    made = tmp_path / "checkpoint"
    for name in ("a/b.json", "a-b/c.json", "model.safetensors", ".cache/huggingface/x.metadata", ".gitattributes"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    return made


def test_they_verify_our_signature_of_a_folder(folder: Path, theirs: Theirs, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert CliRunner().invoke(commands, ["sign", str(folder), "--key", str(private)]).exit_code == 0
    arguments = ("verify", "key", "--signature", f"{folder}{SUFFIX}", "--public_key", public, folder)
    verified = theirs(*arguments)
    assert verified.returncode == 0, verified.stderr
    change(folder / "a/b.json")
    assert theirs(*arguments).returncode != 0


def test_we_verify_their_signature_of_a_folder(folder: Path, theirs: Theirs, keys: tuple[Path, Path]) -> None:
    private, public = keys
    signed = theirs("sign", "key", "--signature", f"{folder}{SUFFIX}", "--private_key", private, folder)
    assert signed.returncode == 0, signed.stderr
    ours = ["verify", str(folder), "--key", str(public)]
    assert CliRunner().invoke(commands, ours).exit_code == 0
    change(folder / "a-b/c.json")
    assert isinstance(CliRunner().invoke(commands, ours).exception, UntrustedModel)
