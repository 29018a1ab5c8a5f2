"""From a checkpoint to a sealed answer, by the commands of docs/models.md; and each command refuses what changed before it.

pytest -m heavy -s tests/heavy/convert/test_chain.py        prints how long each step takes
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from lacre_backend.models import signatures
from lacre_backend.models.gguf import find
from lacre_backend.workshop.converter import ConverterPlace
from parts.up import LACRE, Up, environment

# Seven types are written and measured, beside which other programs may run.
SECONDS: Final = 3600
pytestmark = pytest.mark.timeout(SECONDS)
QUESTION: Final = "What is the capital of France? Answer with one word."


@dataclass
class Workplace:
    """A folder that was empty, and what was made in it. seconds: of each step."""

    folder: Path
    where: ConverterPlace
    seconds: dict[str, float] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def kms(self) -> str:
        return f"file:{self / 'kms.key'}"

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command as an engineer types it in the folder."""
        env = environment(self / "state")
        return subprocess.run([*LACRE, *arguments], cwd=self.folder, env=env, check=False, capture_output=True, text=True)

    def does(self, step: str, *arguments: str) -> str:
        with self.timed(step):
            done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def convert(self) -> tuple[str, ...]:
        options = ("--python", str(self.where.python), "--sources", str(self.where.sources))
        return ("model", "convert", "checkpoint", "--out", "model.gguf", "--signer", "signer.pub.pem", *options)

    @property
    def seal(self) -> tuple[str, ...]:
        return ("model", "seal", "fast.gguf", "--out", "fast.sealed", "--kms", self.kms, "--signer", "signer.pub.pem")

    @property
    def served(self) -> tuple[str, ...]:
        return ("--model", "fast.sealed", "--kms", self.kms, "--signer", "signer.pub.pem")


QUANTIZE: Final = ("model", "quantize", "model.gguf", "--auto", "--out", "fast.gguf")
SIGN: Final = ("model", "sign", "fast.gguf", "--key", "signer.pem")


@pytest.fixture(scope="module")
def made(where: ConverterPlace, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Everything but the answer. The checkpoint's publisher signs it."""
    place = Workplace(tmp_path_factory.mktemp("empty"), where)
    shutil.copytree(checkpoint, place / "checkpoint")
    for arguments in (
        ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "signer.pem"),
        ("ec", "-in", "signer.pem", "-pubout", "-out", "signer.pub.pem"),
    ):
        subprocess.run(["openssl", *arguments], cwd=place.folder, check=True, capture_output=True)
    place.does("sign the checkpoint", "model", "sign", "checkpoint", "--key", "signer.pem")
    assert "as it was signed by" in place.does("convert", *place.convert)
    assert "has no checksum" not in place.does("quantize --auto", *QUANTIZE)
    place.does("sign", *SIGN)
    place.does("seal", *place.seal)
    return place


def test_from_a_checkpoint_to_a_sealed_answer(
    made: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in the empty folder, with no settings file. The manifest names what was signed, and the client pins it."""
    digest = find(made / "fast.gguf").digest
    monkeypatch.chdir(made.folder)
    with made.timed("up, until it is ready"):
        up = Up.start(made / "state", *made.served)
    with up, up.client(pin_models={"fast": digest}) as client:
        with made.timed("a sealed chat"):
            reply = client.chat(QUESTION, max_tokens=16, temperature=0)
        assert "Paris" in reply.text
    with capsys.disabled():
        print(*(f"\n{step:>24} {seconds:8.1f} s" for step, seconds in made.seconds.items()), sep="")


FLIPS: Final = {
    "the checkpoint's weights": ("checkpoint/model.safetensors", -5000, "convert"),
    "its configuration": ("checkpoint/config.json", -5, "convert"),
    "its tokenizer": ("checkpoint/tokenizer.json", 500_000, "convert"),
    "its signature": ("checkpoint.sig", 700, "convert"),
    "the converted weights": ("model.gguf", -5000, "quantize"),
    "the converted vocabulary": ("model.gguf", 300_000, "quantize"),
    "the quantized weights": ("fast.gguf", -5000, "sign"),
    "the signed weights": ("fast.gguf", -5000, "seal"),
    "the signature": ("fast.gguf.sig", -80, "seal"),
    "the sealed model's head": ("fast.sealed", 60, "up"),
    "the wrapped key": ("fast.sealed", None, "up"),
    "the sealed weights": ("fast.sealed", -5_000_000, "up"),
}


@pytest.mark.parametrize("what", FLIPS)
def test_each_step_refuses_what_changed_before_it(made: Workplace, what: str) -> None:
    """One flipped bit: an error that names the file, and nothing new in the folder."""
    name, place, step = FLIPS[what]
    at = (made / name).read_bytes().index(b'"wrapped":"') + 20 if place is None else place
    state = made / "refused"
    commands = {
        "convert": made.convert,
        "quantize": QUANTIZE,
        "sign": SIGN,
        "seal": made.seal,
        "up": ("up", "--state", str(state), "--port", "0", *made.served),
    }
    before = contents(made.folder)
    flip(made / name, at)
    try:
        refused = made.run(*commands[step])
        changed = contents(made.folder)
    finally:
        flip(made / name, at)
        shutil.rmtree(state, ignore_errors=True)
    assert refused.returncode != 0, refused.stdout
    assert refused.stderr.startswith("error: "), refused.stderr
    assert "Traceback" not in refused.stderr
    assert Path(name).name.removesuffix(".sig") in refused.stderr
    assert changed - {"refused/lock", "refused"} == before


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_download_is_compared_with_what_hugging_face_published(made: Workplace, tmp_path: Path) -> None:
    """The metadata is written by Hugging Face's own program."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(made / "checkpoint", folder)
    code = (
        "import sys, hashlib\nfrom pathlib import Path\n"
        "from huggingface_hub._local_folder import write_download_metadata\n"
        "folder = Path(sys.argv[1])\n"
        "for path in [p for p in folder.iterdir() if p.is_file()]:\n"
        "    data = path.read_bytes()\n"
        "    git = hashlib.sha1(b'blob %d\\0' % len(data) + data).hexdigest()\n"
        "    large = path.suffix == '.safetensors'\n"
        "    etag = hashlib.sha256(data).hexdigest() if large else git\n"
        "    write_download_metadata(folder, path.name, 'a' * 40, etag)\n"
    )
    subprocess.run([made.where.python, "-P", "-c", code, folder], check=True)
    convert = ("model", "convert", str(folder), *made.convert[3:])
    convert = tuple(part for part in convert if part not in ("--signer", "signer.pub.pem"))
    convert = tuple(str(tmp_path / "out.gguf") if part == "model.gguf" else part for part in convert)
    assert "4 files as Hugging Face published them" in made.run(*convert).stdout
    flip(folder / "model.safetensors", -5000)
    (tmp_path / "out.gguf").unlink()
    refused = made.run(*convert)
    assert "model.safetensors is not what Hugging Face published" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_signer_is_who_the_manifest_names(made: Workplace) -> None:
    """Whoever approves models makes the key once; its id stands in every signature."""
    public = signatures.public_key(made / "signer.pub.pem")
    bundles = [(made / name).read_bytes() for name in ("checkpoint.sig", "fast.gguf.sig")]
    assert {signatures.claimed_signer(bundle) for bundle in bundles} == {signatures.signer_id(public)}
