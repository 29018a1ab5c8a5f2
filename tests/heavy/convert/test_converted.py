"""A checkpoint made of the default model, converted by llama.cpp's own converter: the same tokens and logits as transformers.

The refusals here are the real converter's; tests/backend/test_conversion.py has the others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_backend.models.gguf import default_path
from lacre_backend.workshop.adapter_inspection import INSPECT_FILE, FileAsked
from lacre_backend.workshop.child import run
from lacre_backend.workshop.conversion import Converted, ConvertedType, convert_model
from lacre_backend.workshop.converter import ConverterPlace
from lacre_backend.workshop.inspection import InspectAsked


def converted(source: Path, out: Path, where: ConverterPlace, kind: ConvertedType = ConvertedType.AUTO) -> Converted:
    return convert_model(source, out, kind, where, lambda _what, _share: None)


def changed(source: Path, folder: Path, name: str, members: dict[str, Any]) -> Path:
    """A copy of the checkpoint with other members in one of its files. The weights are linked."""
    shutil.copytree(source, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    told = json.loads((source / name).read_text())
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(told | members))
    return folder


@pytest.mark.parametrize(("kind", "most", "name"), [(ConvertedType.AUTO, 1e-4, "F16"), (ConvertedType.Q8_0, 0.02, "Q8_0")])
def test_tokens_and_logits_are_those_of_transformers(
    tmp_path: Path, where: ConverterPlace, checkpoint: Path, kind: ConvertedType, most: float, name: str
) -> None:
    found = converted(checkpoint, tmp_path / "out.gguf", where, kind)
    assert found.architecture == "LlamaForCausalLM"
    assert found.probe.tokens > 100
    assert found.probe.kl is not None
    assert found.probe.kl < most
    files = (tmp_path / "out.gguf", default_path())
    inspected, original = (run(INSPECT_FILE, FileAsked(InspectAsked(path))).model for path in files)
    assert inspected is not None
    assert original is not None
    assert inspected.type == name
    assert (inspected.parameters, inspected.template) == (original.parameters, True)
    assert (inspected.vocabulary, inspected.tokenizer) == (original.vocabulary, original.tokenizer)


def test_another_model_is_noticed(tmp_path: Path, where: ConverterPlace, checkpoint: Path) -> None:
    """transformers reads a checkpoint with another epsilon than the one that the converter is given."""
    out = tmp_path / "out.gguf"
    other = changed(checkpoint, tmp_path / "other", "config.json", {"rms_norm_eps": 0.5})
    mixed = ConverterPlace(_converts_another(tmp_path / "python", where.python, checkpoint), where.sources)
    with pytest.raises(SettingsError, match="computes something else than transformers"):
        converted(other, out, mixed)
    assert not out.exists()


def _converts_another(path: Path, python: Path, checkpoint: Path) -> Path:
    """An interpreter that gives the converter this checkpoint in place of the one that it was asked for."""
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *convert_hf_to_gguf.py) s=$2; shift 3; exec {python} -P "$s" {checkpoint} "$@";; esac\n'
        f'exec {python} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("name", "members", "said"),
    [
        ("config.json", {"architectures": ["NeverSeenForCausalLM"]}, "knows no architecture NeverSeenForCausalLM"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "does not know this model's pre-tokenizer"),
    ],
)
def test_what_the_converter_does_not_know_is_refused_by_name(
    tmp_path: Path, where: ConverterPlace, checkpoint: Path, name: str, members: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        converted(changed(checkpoint, tmp_path / "hf", name, members), tmp_path / "out.gguf", where)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
