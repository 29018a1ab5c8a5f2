"""The digests of models in a state folder: recorded by the publisher, repeated in each manifest."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from lacre.errors import SettingsError
from lacre.trust.chain import verify
from lacre.trust.manifest import MAX_OUTPUT, ModelEntry, ModelKind
from lacre_backend.models import signatures
from lacre_backend.models.gguf import find
from lacre_fabric.keys.kms import PLAIN
from lacre_fabric.operate import model_digests
from lacre_fabric.operate.model_digests import ModelRefused
from lacre_fabric.operate.site import Site
from parts.up import LACRE

ONE, TWO, SIGNER = "1" * 64, "2" * 64, "a" * 64


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small", "large"), "other": ("small",)})
    site.create()
    return site


def report(path: Path, **members: Any) -> str:
    path.write_text(json.dumps(members))
    return str(path)


def test_what_was_recorded_is_in_each_manifest(site: Site) -> None:
    model_digests.record(site.models_file, "default", {"small": ModelEntry((ONE,), (SIGNER,)), "gone": ModelEntry((TWO,))})
    model_digests.record(site.models_file, "other", {"small": ModelEntry((TWO,))})
    for _ in range(2):
        pools = verify(site.sign_manifest(), site.root, time.time()).manifest.pools
        assert pools["default"].models == {"small": ModelEntry((ONE,), (SIGNER,)), "large": ModelEntry()}
        assert pools["other"].models == {"small": ModelEntry((TWO,))}
    model_digests.record(site.models_file, "default", {})
    assert model_digests.recorded(site.models_file) == {"other": {"small": ModelEntry((TWO,))}}


def test_answers_of_lacre_model(tmp_path: Path) -> None:
    first = report(tmp_path / "a=1.json", signature="x", signer=SIGNER, digest=f"sha256:{ONE}")
    second = report(tmp_path / "b.json", digest=f"sha256:{TWO}", signature="0" * 64)  # not verified: of `inspect`
    found = model_digests.named([f"small={second}", f"small={second}", "large="], ("small", "large"))
    assert found == {"small": ModelEntry((TWO,)), "large": ModelEntry()}
    assert model_digests.named([f"a=b={first}"], ("a", "a=b")) == {"a=b": ModelEntry((ONE,), (SIGNER,))}
    both = [f"small={second}", f"small={report(tmp_path / 'c.json', digest=f'sha256:{ONE}', signer=SIGNER)}"]
    assert model_digests.named(both, ("small",)) == {"small": ModelEntry((TWO, ONE), (SIGNER,))}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("small", "write MODEL=FILE"), ("huge={file}", "small, large"), ("small={file}.none", "cannot be read"),
        ("small={file}", "no `digest`"),
    ],
)  # fmt: skip
def test_what_is_no_answer(tmp_path: Path, said: str, told: str) -> None:
    file = report(tmp_path / "a.json", digest=ONE)
    with pytest.raises(SettingsError, match=told):
        model_digests.named([said.format(file=file)], ("small", "large"))


def test_adapters_by_the_answer_of_a_worker(tmp_path: Path) -> None:
    """The digest of an adapter's model is that of two files, so an answer of one file is refused."""
    models = ("m", "m:legal", "m:tax")
    answer = report(
        tmp_path / "w.json", models={"m": {"sha256": [ONE], "signers": []}, "m:legal": {"sha256": [TWO], "signers": [SIGNER]}}
    )
    found = model_digests.named([f"m={answer}", f"m:legal={answer}"], models)
    assert found == {"m": ModelEntry((ONE,)), "m:legal": ModelEntry((TWO,), (SIGNER,))}
    with pytest.raises(SettingsError, match="does not name m:tax, but m, m:legal"):
        model_digests.named([f"m:tax={answer}"], models)
    with pytest.raises(SettingsError, match="m:tax is an adapter, whose digest is that of two"):
        model_digests.named([f"m:tax={report(tmp_path / 'a.json', digest=f'sha256:{ONE}')}"], models)
    with pytest.raises(SettingsError, match="cannot be read"):
        model_digests.named([f"m={report(tmp_path / 'b.json', models=[])}"], models)


DESCRIBED: dict[str, Any] = {
    "kind": "embed", "context": 512, "max_output": 7, "modalities": ["text", "image"], "tools": "hermes",
}  # fmt: skip


def test_a_description_is_told_with_the_digest_and_outlives_it(site: Site, tmp_path: Path) -> None:
    """In `lacre worker digests`' answer or a publisher's own. A new digest alone leaves it."""
    entry = ModelEntry((ONE,), (), ModelKind.EMBED, 512, 7, ("text", "image"), "hermes")
    answer = report(tmp_path / "w.json", models={"small": {"sha256": [ONE], "signers": [], **DESCRIBED}})
    own = report(tmp_path / "own.json", digest=f"sha256:{ONE}", **DESCRIBED)
    assert model_digests.named([f"small={answer}"], ("small",)) == {"small": entry}
    assert model_digests.named([f"small={own}"], ("small",)) == {"small": entry}
    model_digests.record(site.models_file, "default", {"small": entry})
    pool = verify(site.sign_manifest(), site.root, time.time()).manifest.pools["default"]
    assert (pool.models["small"], pool.models["large"].output) == (entry, MAX_OUTPUT)
    other = model_digests.named([f"small={report(tmp_path / 'b.json', digest=f'sha256:{TWO}')}"], ("small",))
    assert model_digests.merged({"small": entry}, other) == {"small": replace(entry, sha256=(TWO,))}
    assert model_digests.merged({"small": entry}, {"small": replace(entry, context=9)})["small"].context == 9


@pytest.mark.parametrize(
    "wrong",
    [{"context": 0}, {"context": 2**31}, {"max_output": "9"}, {"max_output": True}, {"modalities": "text"},
     {"modalities": ["T"]}, {"modalities": ["text"] * 9}, {"tools": "a b"}, {"tools": ""}, {"kind": 1}],
)  # fmt: skip
def test_a_description_that_is_none(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="describes its model wrongly"):
        model_digests.named([f"m={report(tmp_path / 'a', digest=f'sha256:{ONE}', **wrong)}"], ("m",))


def test_a_kind_of_a_later_version_is_unknown(tmp_path: Path) -> None:
    found = model_digests.named([f"m={report(tmp_path / 'a', digest=f'sha256:{ONE}', kind='speak')}"], ("m",))
    assert found == {"m": ModelEntry((ONE,))}


def test_a_signer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no id"):
        model_digests.named([f"m={report(tmp_path / 'a', digest=f'sha256:{ONE}', signer='me')}"], ("m",))


@pytest.mark.parametrize("content", ["[]", "{}", '{"pools": {"default": {"models": {"m": {"sha256": ["x"], "signers": []}}}}}'])
def test_a_damaged_record(site: Site, content: str) -> None:
    site.models_file.write_text(content)
    with pytest.raises(SettingsError, match=r"models\.json is damaged"):
        model_digests.recorded(site.models_file)


async def test_files_that_settings_name(site: Site, tmp_path: Path) -> None:
    """As `lacre up` reads them, with the signer that they demand."""
    key, model = ec.generate_private_key(ec.SECP256R1()), find()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "own.gguf").symlink_to(model.path)
    (tmp_path / "own.gguf.sig").write_bytes(signatures.sign(model.digests, "own.gguf", key))
    own = {"name": "own", "path": str(tmp_path / "own.gguf"), "signers": [str(tmp_path / "key.pem")]}
    plain = {"name": "plain", "path": str(model.path)}
    settings = site.worker_settings("default")
    digest = model.digest.removeprefix("sha256:")
    described = ModelEntry(kind=ModelKind.GENERATE, context=8192, max_output=MAX_OUTPUT, modalities=("text",), tools="hermes")
    assert await model_digests.read_served(settings, PLAIN, [plain, {**own, "context": 1000, "max_output": 300}]) == {
        "plain": replace(described, sha256=(digest,)),
        "own": replace(
            described, sha256=(digest,), signers=(signatures.signer_id(key.public_key()),), context=1000, max_output=300
        ),
    }
    (tmp_path / "own.gguf.sig").unlink()
    with pytest.raises(ModelRefused, match=r"own\.gguf: the model own has no signature.*Copy the model and its \.sig"):
        await model_digests.read_served(settings, PLAIN, [plain, own])
    with pytest.raises(SettingsError, match=r"models\.0\.pth: unknown key; the nearest known one is 'path'"):
        await model_digests.read_served(settings, PLAIN, [{"name": "plain", "pth": str(model.path)}])


def test_the_command(site: Site) -> None:
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": [{"name": "plain", "path": str(find().path)}]})
    command = [*LACRE, "worker", "digests", "--settings", str(site.worker_settings("default"))]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split() for line in told.stdout.splitlines()][-1] == ["plain", find().digest, "none"]
