"""`lacre model convert`: folders that are refused before anything runs, the converter's complaints, and the comparison."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.parts.fake_converter import fake_checkpoint, fake_python, fake_sources, write_safetensors
from tests.parts.tiny_model import tiny_model
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.convert import commands
from lacre_backend.workshop import converter
from lacre_backend.workshop.checkpoint import read_checkpoint
from lacre_backend.workshop.conversion import Converted, ConvertedType, convert_model, divergence
from lacre_backend.workshop.converter import ConverterPlace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> ConverterPlace:
    folder = tmp_path_factory.mktemp("converter")
    return ConverterPlace(fake_python(folder / "venv", "torch", "transformers"), fake_sources(folder / "llama.cpp"))


def converted(source: Path, out: Path, where: ConverterPlace) -> Converted:
    return convert_model(source, out, ConvertedType.AUTO, where, lambda _what, _share: None)


def checkpoint(tmp_path: Path, **options: str) -> Path:
    return fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf"), **options)


def test_a_checkpoint_becomes_gguf_and_is_compared(
    tmp_path: Path, where: ConverterPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LACRE_SECRET", "x")  # the stand-in for transformers fails if it sees it
    options = ["--python", str(where.python), "--sources", str(where.sources)]
    out = tmp_path / "out.gguf"
    printed = CliRunner().invoke(commands, ["convert", str(checkpoint(tmp_path)), "--out", str(out), "--json", *options])
    assert printed.exit_code == 0, printed.output
    told = json.loads(printed.stdout)
    assert set(told) == {*Converted.__slots__}
    assert told["probe"]["tokens"] > 150
    assert told["probe"]["kl"] < 1e-4
    assert told["probe"]["same_top"] == 1
    assert told["bytes"] == out.stat().st_size
    table = CliRunner().invoke(commands, ["convert", str(tmp_path / "hf"), "--out", str(out), *options])
    assert "same top token 100.0%" in table.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out.gguf", "source.gguf"]


def test_an_embedding_model_says_that_it_has_no_logits(tmp_path: Path, where: ConverterPlace) -> None:
    source = fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf", embeds=True))
    probe = converted(source, tmp_path / "out.gguf", where).probe
    assert (probe.kind, probe.kl) == ("embed", None)
    assert "no logits" in (probe.not_compared or "")


def test_a_model_that_transformers_cannot_run_is_said_to_be_not_compared(tmp_path: Path, where: ConverterPlace) -> None:
    source = checkpoint(tmp_path)
    (source / "unknown-to-transformers").touch()
    probe = converted(source, tmp_path / "out.gguf", where).probe
    assert probe.kl is None
    assert "Unrecognized configuration class" in (probe.not_compared or "")


def nothing_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.iterdir() if path.name not in ("hf", "source.gguf", "twin.gguf")]


def test_other_weights_are_refused(tmp_path: Path, where: ConverterPlace) -> None:
    twin = tiny_model(tmp_path / "twin.gguf", seed=2)
    source = fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf"), twin)
    with pytest.raises(SettingsError, match=r"computes something else than transformers: KL \d"):
        converted(source, tmp_path / "out.gguf", where)
    assert nothing_left(tmp_path)


def test_other_tokens_are_refused(tmp_path: Path, where: ConverterPlace) -> None:
    twin = tiny_model(tmp_path / "twin.gguf", more={"tokenizer.ggml.add_space_prefix": True})
    source = fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf"), twin)
    with pytest.raises(SettingsError, match=r"other tokens of .The capital.* than transformers, from number 1"):
        converted(source, tmp_path / "out.gguf", where)
    assert nothing_left(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, where: ConverterPlace) -> None:
    source = checkpoint(tmp_path)
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-4096:] = np.full(1024, np.nan, np.float32).tobytes()
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(SettingsError, match="computes no numbers"):
        converted(source, tmp_path / "out.gguf", where)
    assert nothing_left(tmp_path)


COMPLAINTS = {
    "MambaForQuantumLM": "knows no architecture MambaForQuantumLM.*docs/upstream.md",
    "OddTokenizer": "does not know this model's pre-tokenizer .checksum abab",
    "NeedsMore": "needs the package mistral_common. Install it: .*pip install mistral_common",
    "WritesHalf": "failed: RuntimeError: .*disk",
    "WritesNothing": "wrote nothing",
}


@pytest.mark.parametrize("architecture", COMPLAINTS)
def test_complaints_of_the_converter_are_made_short(tmp_path: Path, where: ConverterPlace, architecture: str) -> None:
    with pytest.raises(SettingsError, match=COMPLAINTS[architecture]) as raised:
        converted(checkpoint(tmp_path, architecture=architecture), tmp_path / "out.gguf", where)
    assert len(str(raised.value)) < 600
    assert nothing_left(tmp_path)


def test_the_input_is_never_written_over(tmp_path: Path, where: ConverterPlace) -> None:
    source = checkpoint(tmp_path)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(SettingsError, match="is the input itself"):
        converted(source, source / "model.safetensors", where)
    assert (source / "model.safetensors").read_bytes() == before


def only(*names: str) -> Callable[[Path], None]:
    """Leaves files of these names alone in the folder."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"{}")

    return change


def index(weights: dict[str, str]) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights})) and None


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def huge_head(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def with_code(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))


FOLDERS = {
    "pickles": (only("config.json", "pytorch_model.bin"), "pickles .pytorch_model.bin.*can run any code"),
    "many pickles": (only(*(f"{i}.pt" for i in range(5))), "0.pt, 1.pt, 2.pt and 2 more"),
    "a checkpoint of torch": (only("last.ckpt", "config.json"), "pickles .last.ckpt"),
    "pickles beside other safetensors": (only("pytorch_model.bin", "extra.safetensors"), "pickles .pytorch_model.bin"),
    "ONNX": (only("model.onnx", "config.json"), "ONNX graph.*`upstream`, see docs/upstream.md"),
    "ONNX in a folder": (only("onnx/model.onnx"), "ONNX graph"),
    "SavedModel": (only("saved_model.pb"), "SavedModel of TensorFlow.*docs/upstream.md: TensorFlow Serving"),
    "SavedModel by version": (only("1/saved_model.pb"), "SavedModel of TensorFlow"),
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), "LoRA adapter"),
    "Mistral's layout": (only("consolidated.safetensors"), "Mistral's own layout"),
    "GGUF": (only("a.gguf"), "holds GGUF already"),
    "nothing": (only(), "has no weights"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("[") and None, "no usable JSON"),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 10**6) and None, "no usable JSON"),
    "no architecture": (lambda folder: (folder / "config.json").write_text("{}") and None, "names no architecture"),
    "code of its own": (with_code, "auto_map.*--trust-code"),
    "a missing shard": (index({"a": "model-1.safetensors"}), "lacks model-1.safetensors"),
    "a shard outside": (index({"a": "../model.safetensors"}), "outside its folder"),
    "an empty index": (index({}), "lists no weights"),
    "cut off": (cut, "is cut off"),
    "a huge head": (huge_head, "not whole, or not safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_refused_before_anything_runs(tmp_path: Path, name: str) -> None:
    change, said = FOLDERS[name]
    folder = checkpoint(tmp_path)
    change(folder)
    with pytest.raises(SettingsError, match=said):
        read_checkpoint(folder)


@pytest.mark.parametrize(("name", "said"), [("x.gguf", "GGUF already"), ("x.onnx", "ONNX graph"), ("x.bin", "Give the folder")])
def test_files_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SettingsError, match=said):
        read_checkpoint(tmp_path / name)


def test_code_of_a_model_may_be_trusted(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    with_code(folder)
    assert read_checkpoint(folder, trust_code=True).architecture == "LlamaForCausalLM"


def test_parameters_are_counted_over_all_shards(tmp_path: Path) -> None:
    only("config.json")(checkpoint(tmp_path))
    folder = tmp_path / "hf"
    (folder / "config.json").write_text('{"architectures": ["X"]}')
    for name in ("model-1", "model-2"):
        write_safetensors(folder / f"{name}.safetensors", {"a": np.ones((3, 4)), "b": np.ones(5)})
    index({"a": "model-1.safetensors", "b": "model-2.safetensors"})(folder)
    found = read_checkpoint(folder)
    assert (found.parameters, [path.name for path in found.weights]) == (34, ["model-1.safetensors", "model-2.safetensors"])


def test_what_the_environment_lacks_is_said_with_the_commands(tmp_path: Path, where: ConverterPlace) -> None:
    with pytest.raises(SettingsError, match=r"There is none at .*(?s:.*)python3 -m venv (?s:.*)pip install torch transformers"):
        converter.place(tmp_path / "none" / "bin" / "python", where.sources)
    without = fake_python(tmp_path / "venv", "transformers")
    with pytest.raises(SettingsError, match=r"has no torch, which(?s:.*)pip install torch"):
        converter.place(without, where.sources)
    with pytest.raises(SettingsError, match=r"The converter itself is missing(?s:.*)pip download .*llama-cpp-python==0"):
        converter.place(where.python, tmp_path / "absent.tar.gz")
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    with pytest.raises(SettingsError, match="no Python interpreter that runs"):
        converter.place(other, where.sources)
    assert converter.place(where.python, where.sources) == where


def test_another_archive_is_never_unpacked(tmp_path: Path) -> None:
    path = tmp_path / converter.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("x/vendor/llama.cpp/convert_hf_to_gguf.py")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(SettingsError, match="is not the archive of llama-cpp-python"), converter.unpacked(path):
        pytest.fail("it was unpacked")
    with pytest.raises(SettingsError, match=r"has no convert_hf_to_gguf\.py"), converter.unpacked(tmp_path):
        pytest.fail("it was used")


def test_the_archive_is_the_locked_one() -> None:
    lock = (ROOT / "requirements/native.lock").read_text()
    assert f"llama-cpp-python=={converter.VERSION} " in lock
    assert f"sha256:{converter.DIGEST}" in lock


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    printed = CliRunner().invoke(commands, ["convert", str(tmp_path), "--out", "x", "--type", "q3"])
    assert isinstance(printed.exception, SettingsError)
    assert "auto, f32, f16, bf16, q8_0" in str(printed.exception)


def test_divergence_is_zero_for_equal_logits_alone() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    assert divergence(logits, logits + 3) == (pytest.approx(0, abs=1e-6), 1.0)
    loss, same = divergence(logits, -logits)
    assert loss > 0.1
    assert same == 0
