"""`lacre worker tune`: what it chooses, and what it writes where."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_backend.commands import tune
from lacre_backend.engine.tune import SLOTS, Way, choose
from lacre_backend.settings import load
from parts.tiny_model import tiny_model

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
    assert 'path = "tiny.gguf"  # stays' in text
    assert text.count("threads =") == 1
    assert text.startswith("# ours")
    tune.run(path, said.append)
    again = path.read_text()
    assert again.count("#| tok/s") == 1
    assert tomllib.loads(again).keys() == tomllib.loads(SETTINGS).keys()
    assert any("chosen" in line for line in said)


def test_models_in_another_form_are_not_guessed_at() -> None:
    with pytest.raises(SettingsError):
        tune.written('models = [{ path = "x" }]\n', 0, {"threads": "1"}, [])
