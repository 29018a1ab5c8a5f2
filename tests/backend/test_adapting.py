"""`lacre model convert` of a LoRA adapter: the comparison with peft, and folders that are refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parts.fake_converter import fake_adapter, fake_checkpoint, fake_python, fake_sources, write_safetensors
from tests.parts.tiny_model import tiny_lora, tiny_model
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.convert import commands
from lacre_backend.workshop import converter
from lacre_backend.workshop.adapter_folder import read_adapter
from lacre_backend.workshop.adapting import NEEDED, ConvertedAdapter, convert_adapter
from lacre_backend.workshop.conversion import ConvertedType
from lacre_backend.workshop.converter import ConverterPlace


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> ConverterPlace:
    folder = tmp_path_factory.mktemp("converter")
    return ConverterPlace(fake_python(folder / "venv", "torch", "transformers", "peft"), fake_sources(folder / "llama.cpp"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return fake_checkpoint(tmp_path / "hf", tiny_model(tmp_path / "source.gguf"))


def adapter(tmp_path: Path, base: Path, twin: Path | None = None, **members: Any) -> Path:
    return fake_adapter(tmp_path / "lora", tiny_lora(tmp_path / "lora.gguf"), base, twin, **members)


def converted(folder: Path, out: Path, where: ConverterPlace) -> ConvertedAdapter:
    return convert_adapter(read_adapter(folder), out, ConvertedType.AUTO, where, lambda _what, _share: None)


def nothing_left(tmp_path: Path) -> bool:
    known = ("hf", "lora", "source.gguf", "lora.gguf", "twin.gguf")
    return not [path for path in tmp_path.iterdir() if path.name not in known]


def test_an_adapter_becomes_gguf_and_is_compared(tmp_path: Path, base: Path, where: ConverterPlace) -> None:
    options = ["--python", str(where.python), "--sources", str(where.sources), "--base", str(base)]
    folder, out = adapter(tmp_path, base, base_model_name_or_path="somewhere/else"), tmp_path / "out.gguf"
    printed = CliRunner().invoke(commands, ["convert", str(folder), "--out", str(out), "--json", *options])
    assert printed.exit_code == 0, printed.output
    told = json.loads(printed.stdout)
    assert set(told) == {*ConvertedAdapter.__slots__}
    assert (told["rank"], told["alpha"], told["targets"]) == (4, 4, ["attn_output", "attn_q", "attn_v"])
    assert told["probe"]["kl"] < 1e-3 < 0.1 < told["probe"]["effect"]
    assert told["bytes"] == out.stat().st_size
    table = CliRunner().invoke(commands, ["convert", str(folder), "--out", str(out), *options])
    assert "same top token 100.0%" in table.stdout
    out.unlink()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("twin", [{"seed": 8}, {"metadata": {"adapter.lora.alpha": 6.0}}])
def test_another_adapter_or_another_scale_is_refused(
    tmp_path: Path, base: Path, where: ConverterPlace, twin: dict[str, Any]
) -> None:
    folder = adapter(tmp_path, base, tiny_lora(tmp_path / "twin.gguf", **twin))
    with pytest.raises(SettingsError, match=r"computes something else than transformers: KL \d"):
        converted(folder, tmp_path / "out.gguf", where)
    assert nothing_left(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Path, where: ConverterPlace) -> None:
    folder = adapter(tmp_path, base)
    write_safetensors(
        folder / "adapter_model.safetensors",
        {
            f"base_model.model.blk.0.attn_q.lora_{half}.weight": np.ones(shape)
            for half, shape in (("A", (4, 32)), ("B", (64, 4)))
        },
    )
    with pytest.raises(SettingsError, match="does not fit the base model's shape"):
        converted(folder, tmp_path / "out.gguf", where)
    assert nothing_left(tmp_path)


def test_what_the_environment_lacks_is_said(tmp_path: Path, where: ConverterPlace) -> None:
    without = fake_python(tmp_path / "venv", "torch", "transformers")
    with pytest.raises(SettingsError, match=r"has no peft, which(?s:.*)pip install torch .*protobuf peft"):
        converter.place(without, where.sources, NEEDED)


REFUSED = {
    "DoRA": ({"use_dora": True}, "holds DoRA, which llama.cpp cannot apply"),
    "another kind": ({"peft_type": "IA3"}, "an adapter of the kind IA3"),
    "biases": ({"bias": "all"}, "trained biases"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "other alphas": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    "another scale": ({"use_rslora": True}, "Set use_rslora to false and lora_alpha to 8 in adapter_config.json"),
    "no rank": ({"r": None}, "gives no rank"),
    "an alpha that is no number": ({"lora_alpha": float("nan")}, "gives no rank"),
    "a base that is not here": ({"base_model_name_or_path": "org/model"}, "was trained on org/model, and .* --base"),
    "no base": ({"base_model_name_or_path": None}, "a model that it does not name"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_would_compute_something_else(tmp_path: Path, base: Path, name: str) -> None:
    members, said = REFUSED[name]
    with pytest.raises(SettingsError, match=said):
        read_adapter(adapter(tmp_path, base, **members))


def test_weights_that_are_refused(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path, base)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SettingsError, match="is cut off"):
        read_adapter(folder)
    write_safetensors(weights, {"base_model.model.lm_head.weight": np.ones((2, 2))})
    with pytest.raises(SettingsError, match=r"is no LoRA adapter: its tensor .base_model\.model\.lm_head\.weight. is none"):
        read_adapter(folder)
    write_safetensors(weights, {})
    with pytest.raises(SettingsError, match="it is empty"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(SettingsError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(SettingsError, match=r"as a pickle .adapter_model\.bin.*can run any code"):
        read_adapter(folder)


def test_a_base_is_for_adapters_alone(tmp_path: Path, base: Path) -> None:
    printed = CliRunner().invoke(commands, ["convert", str(base), "--out", str(tmp_path / "x"), "--base", str(base)])
    assert isinstance(printed.exception, SettingsError)
    assert "has no adapter_config.json" in str(printed.exception)
