"""`lacre up --model` with a model that is signed, sealed, or neither as it must be: no worker.toml is written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

import lacre
from lacre.client import fetch_manifest
from lacre.jose.jws import b64u
from lacre_backend.engine.adapted import adapted_digest
from lacre_backend.models import signatures
from lacre_backend.models.gguf import find
from lacre_backend.workshop.sealing import seal_model
from lacre_fabric.operate.nats_server import free_port
from parts.tiny_model import tiny_lora, tiny_model
from parts.tiny_projector import has_mtmd, tiny_projector
from parts.up import Up, run


@dataclass(frozen=True)
class Made:
    """A model in every form, in one folder."""

    folder: Path

    @property
    def kms(self) -> str:
        return f"file:{self.folder / 'kms.key'}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def flipped(self, name: str, at: int) -> str:
        """A copy with one changed bit. at: counted from the end if negative."""
        data = bytearray((self / name).read_bytes())
        data[at] ^= 1
        path = self / f"flipped-{name}"
        path.write_bytes(data)
        if (signature := self / f"{name}.sig").exists():
            path.with_name(f"{path.name}.sig").write_bytes(signature.read_bytes())
        return str(path)

    def by_a_vault(self) -> str:
        """A copy that says that a vault wrapped its key. The token is for that vault."""
        data = (self / "m.sealed").read_bytes()
        at = data.index(b'{"by":"file"')
        after = at + int.from_bytes(data[at - 4 : at], "big")
        block = json.dumps({"by": "vault", "wrapped": b64u(b"vault:v1:AAAA")}).encode()
        renamed = data[: at - 4] + len(block).to_bytes(4, "big") + block + data[after:]
        (self / "vault.sealed").write_bytes(renamed)
        (self / "token").touch(0o600)
        (self / "token").write_text("t")
        return str(self / "vault.sealed")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    model = tiny_model(tmp_path / "m.gguf")
    for name in ("signer", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
        if name == "signer":
            signatures.signature_path(model).write_bytes(signatures.sign(find(model).digests, "m.gguf", key))
    seal_model(model, tmp_path / "m.sealed", f"file:{tmp_path / 'kms.key'}", lambda _what, _share: None)
    tiny_model(tmp_path / "unsigned.gguf")
    return Made(tmp_path)


REFUSED: dict[str, tuple[Callable[[Made], list[str]], int, str]] = {
    "sealed, without an address": (lambda m: [str(m / "m.sealed")], 1, "m.sealed is sealed. Give the address"),
    "the key is gone": (lambda m: [str(m / "m.sealed"), "--kms", f"{m.kms}.gone"], 1, "kms.key.gone is gone"),
    "another kind of service": (
        lambda m: [str(m / "m.sealed"), "--kms", "vault://127.0.0.1:9/transit/x"],
        5,
        "m.sealed: the model's key was wrapped by file:, but `kms` is vault:. Check",
    ),
    "the service is away": (
        lambda m: [m.by_a_vault(), "--kms", f"vault://127.0.0.1:{free_port()}/transit/x?token-file={m / 'token'}"],
        1,
        "the vault at 127.0.0.1 does not answer",
    ),
    "no signature": (
        lambda m: [str(m / "unsigned.gguf"), "--signer", str(m / "signer.pub")],
        5,
        "unsigned.gguf: the model unsigned has no signature",
    ),
    "signed by another": (
        lambda m: [str(m / "m.sealed"), "--kms", m.kms, "--signer", str(m / "other.pub")],
        5,
        "m.sealed: the model's signature is by no key that is trusted here",
    ),
    "changed": (
        lambda m: [m.flipped("m.gguf", -5000), "--signer", str(m / "signer.pub")],
        5,
        "flipped-m.gguf: the model differs from the signed one",
    ),
    "changed where the weights are sealed": (
        lambda m: [m.flipped("m.sealed", -5000), "--kms", m.kms],
        5,
        "of the sealed model is damaged or edited",
    ),
    "no key": (lambda m: [str(m / "m.gguf"), "--signer", str(m / "none.pub")], 1, "none.pub cannot be used"),
    "no address": (lambda m: [str(m / "m.gguf"), "--kms", "file:kms.key"], 1, "file: needs the absolute path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_model_leaves_no_state(made: Made, case: str) -> None:
    """The next attempt, with another address or key, finds nothing that was made for this one."""
    arguments, code, said = REFUSED[case]
    state = made / "state"
    done = run("up", "--state", str(state), "--port", "0", "--model", *arguments(made), state=state)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in state.iterdir()] in ([], ["lock"])


@pytest.mark.slow
def test_a_signed_and_sealed_model_is_served_and_named(made: Made) -> None:
    """The manifest names the digest and the signer, so that an application can pin them. A restart needs no option."""
    digest = find(made / "m.gguf").digest
    arguments = ("--model", str(made / "m.sealed"), "--kms", made.kms, "--signer", str(made / "signer.pub"))
    with Up.start(made / "state", *arguments) as up, up.client(pin_models={"m": digest}) as client:
        assert client.chat("Hi.", max_tokens=4, temperature=0).usage.completion == 4
        entry = fetch_manifest(up.url).pools["default"].models["m"]
        signer = signatures.signer_id(signatures.public_key(made / "signer.pub"))
        assert (entry.digests, entry.signers) == ((digest,), (signer,))
    with Up.start(made / "state") as up, up.client(pin_models={"m": "sha256:" + "0" * 64}, retries=0) as client:
        with pytest.raises(lacre.WrongModel):
            client.chat("Hi.", max_tokens=4)
    (made / "m.sealed").write_bytes((made / "m.gguf").read_bytes())
    done = run("up", "--state", str(made / "state"), "--port", "0", state=made / "state")
    assert (done.returncode, "m.sealed: the model m has no signature" in done.stderr) == (5, True), done.stderr


@pytest.mark.slow
def test_adapters_are_models_of_their_own(made: Made) -> None:
    """Named in the manifest by the digest that receipts have, and kept: a restart needs no option."""
    loras = [tiny_lora(made / f"{name}.gguf", seed=seed) for name, seed in (("legal", 7), ("tax", 8))]
    digests = {f"m:{path.stem}": adapted_digest(find(made / "m.gguf").digest, find(path).digest) for path in loras}
    first = ("--model", str(made / "m.gguf"), "--adapter", f"legal={loras[0]}")
    for arguments, names in (
        (first, ("m:legal",)),
        (("--adapter", f"tax={loras[1]}"), ("m:legal", "m:tax")),
        ((), ("m:legal", "m:tax")),
    ):
        with (
            Up.start(made / "state", *arguments) as up,
            up.client(pin_models={name: digests[name] for name in names}) as client,
        ):
            models = fetch_manifest(up.url).pools["default"].models
            assert list(models) == ["m", *names]
            assert [models[name].digests for name in names] == [(digests[name],) for name in names]
            texts = [client.chat("Hi.", model=name, max_tokens=8, temperature=0).text for name in ("m", *names)]
            assert len(set(texts)) == len(texts), "each answers in its own way"


def test_a_projector_that_cannot_be_served_leaves_no_state(made: Made) -> None:
    """By its head, for several models, and where this llama-cpp-python has no mtmd."""
    state, models = made / "state", ("--model", str(made / "m.gguf"))
    other, own = tiny_projector(made / "other.gguf", n_embd=32), tiny_projector(made / "mmproj.gguf")
    cases = [
        ((*models, "--projector", str(other)), "it makes states of 32 numbers, and those of m.gguf have 64"),
        ((*models, "--projector", str(made / "none.gguf")), "none.gguf"),
        ((*models, "--model", str(made / "two.gguf"), "--projector", str(own)), "--projector is for one model, and 2"),
    ]
    if not has_mtmd():
        cases = [((*models, "--projector", str(own)), "was built with mtmd"), cases[2]]
    for arguments, told in cases:
        done = run("up", "--state", str(state), "--port", "0", *arguments, state=state)
        assert (done.returncode, told in done.stderr) == (1, True), done.stderr
        assert [path.name for path in state.iterdir()] in ([], ["lock"])


def test_adapters_that_cannot_be_served(made: Made) -> None:
    """An adapter of another model is refused by name, and an option without a file says how to write it."""
    other = tiny_lora(made / "other.gguf", metadata={"general.architecture": "qwen2"})
    for said, told in ((f"legal={other}", "for the architecture qwen2, and m.gguf is llama"), ("legal", "write NAME=FILE")):
        done = run("up", "--state", str(made / "state"), "--port", "0", "--model", str(made / "m.gguf"), "--adapter", said,
                   state=made / "state")  # fmt: skip
        assert done.returncode == 1
        assert told in done.stderr, done.stderr
