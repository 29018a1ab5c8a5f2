"""`lacre worker tune`: what it chooses, and what it writes where."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_backend.commands import tune
from lacre_backend.engine.pace import PREFILL
from lacre_backend.engine.sizing import derive
from lacre_backend.engine.speculation import SpeculationCounts
from lacre_backend.engine.tune import SLOTS, TuningResult, Way, choose
from lacre_backend.engine.tune_speculation import SpeculationTrial
from lacre_backend.engine.tune_steps import LEAST, PAUSE, SHARES, SIZES, StepTimes, choose_steps
from lacre_backend.engine_process.loading import options
from lacre_backend.settings import ModelSettings, load
from lacre_fabric.keys.kms import PLAIN
from parts.tiny_model import tiny_model, tiny_recurrent_model

FAST, SLOW = Way(2, True, False), Way(1, False, True)
SETTINGS = """# ours
pool = "default"
node = "n1"
trust = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
keys = "keys"
receipt_key = "rk"

[nats]
url = "nats://127.0.0.1:4222"
credentials = "c"

[[models]]
path = "tiny.gguf"  # stays
threads = 7
"""


def test_the_fewest_slots_that_come_near_the_best() -> None:
    rates = {FAST: dict(zip(SLOTS, (50.0, 90.0, 198.0, 200.0), strict=True)), SLOW: dict.fromkeys(SLOTS, 60.0)}
    assert (choose(rates, 16).way, choose(rates, 16).slots) == (FAST, 8)
    assert choose(rates, 4).slots == 4
    assert choose(rates, 1).way == SLOW


def test_it_writes_its_choice_and_its_table(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny.gguf")
    path = tmp_path / "worker.toml"
    path.write_text(SETTINGS)
    said: list[str] = []
    tune.run(path, said.append)
    text = path.read_text()
    (model,) = load(path).models
    assert model.slots in SLOTS
    assert model.threads is not None
    assert model.flash is not None
    assert LEAST <= model.burst <= model.chunk < model.n_batch
    assert model.slots + model.burst + model.chunk <= model.n_batch
    assert 0.2 <= model.prefill <= PREFILL
    assert derive(tmp_path / "tiny.gguf", options(model)).limits.chunk == model.chunk, "a worker takes what was written"
    assert 'path = "tiny.gguf"  # stays' in text
    assert text.count("threads =") == 1
    assert text.startswith("# ours")
    tune.run(path, said.append)
    again = path.read_text()
    assert again.count("#| tok/s") == again.count("#| ms a step") == 1
    assert again.count("\nn_batch = ") == again.count("\nprefill = ") == 1
    assert tomllib.loads(again).keys() == tomllib.loads(SETTINGS).keys()
    assert again.count("#| speculation lookup: ") == again.count("\nspeculation = ") == 1
    assert any("chosen: threads" in line for line in said)
    assert any("times as fast with 1" in line and "guesses right" in line for line in said)
    assert any("chosen: speculation " in line for line in said)


def times(quiet: float, token: float, fixed: float = 0.0, most: int = 2048) -> StepTimes:
    """Of a machine where a step takes `fixed` seconds, and each token of a prompt as many as given."""
    sizes = [n for n in SIZES if n <= most]
    return StepTimes(quiet, {n: fixed + token * n for n in sizes}, {n: quiet + token * n for n in sizes})


def test_the_sizes_of_steps_follow_from_the_machine() -> None:
    cpu = choose_steps(times(0.02, 0.0007), 8)
    assert (cpu.chunk, cpu.burst, cpu.prefill) == (LEAST, LEAST, PREFILL), "more tokens in a step gain nothing"
    gpu = choose_steps(times(0.02, 0.00001, fixed=0.02), 32)
    assert gpu.chunk == gpu.burst == 2048, "even a whole chunk takes no time that a reader notices"
    assert gpu.n_batch >= 32 + gpu.burst + gpu.chunk
    slow = choose_steps(times(0.3, 0.002, fixed=0.3), 8)
    assert LEAST < slow.burst < slow.chunk, "a step of the answers alone takes longer than that"
    middle = choose_steps(times(0.01, 0.0001, fixed=0.02, most=1024), 8)
    assert 0.01 + 0.0001 * middle.burst <= PAUSE


@pytest.mark.parametrize("old", [{"n_batch": 1024, "n_ubatch": 1024}, {"n_ubatch": 512}, {"n_ubatch": 2048}, {"n_batch": 64}])
def test_what_is_chosen_is_what_a_worker_takes(tmp_path: Path, old: dict[str, Any]) -> None:
    """Whatever sizes the settings had before."""
    path = tiny_model(tmp_path / "tiny.gguf")
    wanted = options(ModelSettings(path=path, context=512, **old))
    for slots in SLOTS:
        base = tune.as_chosen(wanted, TuningResult(FAST, slots, {}))
        assert derive(path, base).limits.slots == slots, "tuning can begin"
        sizes = choose_steps(times(0.02, 0.0007), slots, base.n_ubatch or 0)
        found = derive(path, tune.with_sizes(base, sizes)).limits
        assert (found.step, found.chunk, found.burst) == (sizes.n_batch, sizes.chunk, sizes.burst)
        assert found.step >= old.get("n_ubatch", 1)


def test_tuning_a_file_whose_sizes_were_set_writes_what_a_worker_takes(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny.gguf")
    path = tmp_path / "worker.toml"
    path.write_text(SETTINGS + "n_batch = 1024\nn_ubatch = 1024\nslots = 64\nburst = 900\n")
    tune.run(path, lambda _line: None)
    (model,) = load(path).models
    assert model.n_ubatch == 1024
    assert derive(tmp_path / "tiny.gguf", options(model)).limits.step == model.n_batch


def test_a_share_that_gains_nothing_is_not_given_to_prompts() -> None:
    """On a machine where the largest measured prompt fits into a small share."""
    assert choose_steps(times(0.1, 0.00001, most=512), 8).prefill == min(SHARES)
    assert choose_steps(times(0.1, 0.01), 8).prefill == PREFILL
    flat = choose_steps(StepTimes(0.0, dict.fromkeys(SIZES, 0.1), {}), 1)
    assert (flat.prefill, flat.burst) == (PREFILL, LEAST), "a single slot has nothing beside it"


@pytest.mark.parametrize(
    ("gains", "worth_it"),
    [({1: 1.2, 8: 1.0}, True), ({1: 1.04, 8: 1.04}, False), ({1: 2.0, 8: 0.9}, False), ({1: 0.99, 8: 0.97}, False)],
)
def test_speculation_is_off_without_a_gain(gains: dict[int, float], worth_it: bool) -> None:
    trial = SpeculationTrial("lookup", gains, SpeculationCounts(9, 40, 30))
    assert trial.worth_it == worth_it
    assert "30 of 40 guesses right (75%)" in str(trial)


def test_a_model_that_cannot_take_guesses_back_is_not_tried(tmp_path: Path) -> None:
    path = tiny_recurrent_model(tmp_path / "tiny.gguf")
    said: list[str] = []
    choice = TuningResult(Way(1, True, False), 1, {})
    assert tune.speculations(path, ModelSettings(path=path), PLAIN, choice, said.append) == []
    assert "speculation lookup: not tried: " in said[0]


def test_it_tunes_a_recurrent_model(tmp_path: Path) -> None:
    """Its state cannot be cut back after a step."""
    tiny_recurrent_model(tmp_path / "tiny.gguf")
    path = tmp_path / "worker.toml"
    path.write_text(SETTINGS)
    said: list[str] = []
    tune.run(path, said.append)
    (model,) = load(path).models
    assert model.slots in SLOTS and model.speculation == "off"
    assert LEAST <= model.burst <= model.chunk < model.n_batch
    assert any("speculation lookup: not tried: " in line for line in said)


def test_it_tries_a_draft_model(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny.gguf")
    tiny_model(tmp_path / "small.gguf")
    path = tmp_path / "worker.toml"
    path.write_text(SETTINGS + 'draft_model = "small.gguf"\n')
    said: list[str] = []
    tune.run(path, said.append)
    assert any("speculation draft: " in line for line in said)
    assert "draft_model = " in path.read_text(), "it stays, whatever was chosen"


def test_models_in_another_form_are_not_guessed_at() -> None:
    with pytest.raises(SettingsError):
        tune.written('models = [{ path = "x" }]\n', 0, {"threads": "1"}, [])
