"""`lacre model bench`: what is counted, and which questions are refused. No figure is compared with the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.parts.tiny_model import tiny_model, tiny_split_model
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.measure import commands
from lacre_backend.workshop.benchmark import BENCH, BenchAsked, Benchmark
from lacre_backend.workshop.child import run
from lacre_backend.workshop.sealing import seal_model


def test_each_number_of_streams_is_measured(tmp_path: Path) -> None:
    printed = CliRunner().invoke(commands, ["bench", str(tiny_model(tmp_path / "tiny.gguf")), "--rounds", "1", "--json"])
    assert printed.exit_code == 0, printed.output
    told = json.loads(printed.stdout)
    assert set(told) == {*Benchmark.__slots__}
    assert [rate["streams"] for rate in told["rates"]] == [1, 4, 8, 16]
    assert all(rate["tokens_per_second"] > 0 and rate["decode"] > 0 and rate["first_token_ms"] > 0 for rate in told["rates"])
    assert told["prompt_tokens"] == 512
    assert told["prompt_tokens_per_second"] > 0


def test_a_split_model_counts_whole_and_a_short_context_is_enough(tmp_path: Path) -> None:
    files = tiny_split_model(tmp_path)
    found = run(BENCH, BenchAsked(files[1], rounds=1))
    assert found.bytes == sum(file.stat().st_size for file in files)
    assert (found.kind, found.slots) == ("generate", 16)


def test_an_embedding_model_is_measured_by_the_tokens_that_it_reads(tmp_path: Path) -> None:
    found = run(BENCH, BenchAsked(tiny_model(tmp_path / "tiny.gguf", embeds=True), rounds=1))
    assert found.kind == "embed"
    assert all(rate.decode is None and rate.tokens_per_second > 0 for rate in found.rates)


def test_a_sealed_model_is_measured_with_its_key_alone(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    kms = f"file:{tmp_path / 'key'}"
    seal_model(tiny_model(tmp_path / "tiny.gguf"), tmp_path / "tiny.sealed", kms, lambda _what, _share: None)
    assert run(BENCH, BenchAsked(tmp_path / "tiny.sealed", kms, 1)).rates[0].tokens_per_second > 0
    with pytest.raises(SettingsError, match="is sealed"):
        run(BENCH, BenchAsked(tmp_path / "tiny.sealed", rounds=1))


@pytest.mark.parametrize(
    ("name", "rounds", "said"), [("absent.gguf", 1, "No such model file"), ("tiny.gguf", 0, "--rounds is 0")]
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, name: str, rounds: int, said: str) -> None:
    tiny_model(tmp_path / "tiny.gguf")
    with pytest.raises(SettingsError, match=said):
        run(BENCH, BenchAsked(tmp_path / name, rounds=rounds))
