"""`lacre model choose`: what fits, what is for the task, and what keeps the bound of its loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.parts.tiny_model import tiny_lora, tiny_model, tiny_split_model
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.measure import commands, size
from lacre_backend.engine.sizing import OVERHEAD
from lacre_backend.workshop.choosing import Candidate, ChooseAsked, ChosenModel, choose
from lacre_backend.workshop.examples import ModelTask


def chosen(folder: Path, task: ModelTask = ModelTask.CHAT, **more: object) -> ChosenModel:
    asked = ChooseAsked(folder, task, **{"measure": False} | more)  # type: ignore[arg-type]
    return choose(asked, lambda _what, _share: None)


def by_name(found: ChosenModel) -> dict[str, Candidate]:
    return {each.path.name: each for each in found.candidates}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "chat.gguf")
    tiny_model(tmp_path / "embed.gguf", embeds=True)
    tiny_model(tmp_path / "rerank.gguf", more={"llama.pooling_type": 4})
    whole = (tmp_path / "chat.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-4096])
    return tmp_path


@pytest.mark.parametrize("task", ModelTask)
def test_the_model_for_the_task_is_chosen_and_the_others_say_why_not(folder: Path, task: ModelTask) -> None:
    found = chosen(folder, task)
    assert found.chosen == folder / f"{task}.gguf"
    assert [each.path.name for each in found.candidates if each.suits] == [f"{task}.gguf"]
    reasons = {name: each.reason or "" for name, each in by_name(found).items() if not each.suits}
    assert "is cut off" in reasons.pop("cut.gguf")
    assert {name: f"it is for {name.removesuffix('.gguf')}" for name in reasons} == reasons


def test_what_does_not_fit_is_not_chosen(folder: Path) -> None:
    model = folder / "chat.gguf"
    small, large = (chosen(folder, memory=OVERHEAD + room) for room in (1, 2**30))
    assert small.chosen is None
    assert "does not fit" in (by_name(small)["chat.gguf"].reason or "")
    fitted = by_name(large)["chat.gguf"]
    assert fitted.suits
    assert fitted.bytes == model.stat().st_size
    assert OVERHEAD + model.stat().st_size < (fitted.memory or 0) <= OVERHEAD + 2**30


def test_a_split_model_is_one_candidate(tmp_path: Path) -> None:
    files = tiny_split_model(tmp_path)
    found = chosen(tmp_path)
    assert [each.path for each in found.candidates] == [files[0]]
    assert found.candidates[0].bytes == sum(file.stat().st_size for file in files)
    files[1].unlink()
    assert all("missing" in (each.reason or "") for each in chosen(tmp_path).candidates)


def test_speed_and_loss_are_measured_and_bounded(tmp_path: Path) -> None:
    reference = tiny_model(tmp_path / "a.gguf")
    tiny_model(tmp_path / "b.gguf", seed=2)
    options = ["--quality", "0.02", "--reference", str(reference), "--memory", "2GiB"]
    printed = CliRunner().invoke(commands, ["choose", str(tmp_path), *options, "--json"])
    assert printed.exit_code == 0, printed.output
    told = json.loads(printed.stdout)
    assert told["chosen"] == str(reference)
    same, other = told["candidates"]
    assert same["kl"] == 0
    assert same["streams"] > 0
    assert same["prompt"] > 0
    assert (other["suits"], other["reason"]) == (False, "its loss is above 0.02")
    assert other["kl"] > 0.02


def test_the_table_has_a_row_for_each_file(folder: Path) -> None:
    tiny_lora(folder / "lora.gguf")
    printed = CliRunner().invoke(commands, ["choose", str(folder), "--no-measure"])
    assert printed.exit_code == 0, printed.output
    heading, *rows = printed.stdout.splitlines()
    assert "tok/s" not in heading  # not measured
    assert sorted(row.split()[0] for row in rows[:5]) == ["chat.gguf", "cut.gguf", "embed.gguf", "lora.gguf", "rerank.gguf"]
    assert [row.split()[1] for row in rows[:5]] == ["yes", "no", "no", "no", "no"]
    assert len(rows) == 5 + 4 + 1
    assert "lora.gguf: it is an adapter, not a model" in rows
    assert f"Chosen: {folder / 'chat.gguf'}" in printed.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quality": 0.1}, "Give it with --reference"),
        ({"task": ModelTask.EMBED, "reference": Path("x.gguf")}, "for --task chat alone"),
        ({"memory": 5}, "buffers alone take"),
    ],
)
def test_questions_that_contradict_themselves_are_refused(folder: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        chosen(folder, **options)  # type: ignore[arg-type]


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no GGUF file"):
        chosen(tmp_path)
    with pytest.raises(SettingsError, match="is a file"):
        chosen(tiny_model(tmp_path.parent / "model.gguf"))
    with pytest.raises(SettingsError, match="No such folder"):
        chosen(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "expected"), [("5", 5), ("512MiB", 512 * 2**20), ("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9)]
)
def test_sizes_have_units(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "-1GB", "4 apples", "GiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--memory is"):
        size(text)
