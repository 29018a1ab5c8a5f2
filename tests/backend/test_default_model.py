"""Which type of the default model is served: the choice, the cache, and everything that leads back to the shipped file."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.parts.small_disk import NO_DISK, small_disk
from tests.parts.tiny_model import tiny_model
from tests.parts.up import descendants

from lacre.errors import SettingsError
from lacre.runtime import file_locks
from lacre_backend.engine.tune import SLOTS
from lacre_backend.models.gguf import find
from lacre_backend.settings import load
from lacre_backend.workshop.default_model import (
    ALIKE,
    LEAST_GAIN,
    DefaultModel,
    KnownModel,
    Surroundings,
    TriedType,
    TypeLoss,
    best,
    chosen,
    known_models,
    record_path,
)
from lacre_backend.workshop.quantization import MAX_KL
from lacre_backend.workshop.source import SourceModel
from lacre_backend.workshop.speed import Speed

pytestmark = pytest.mark.usefixtures("one_core")
LOSSES = {"F16": TypeLoss(0.001, 0.99, 300_000), "Q8_0": TypeLoss(0.005, 0.95, 200_000), "Q4_0": TypeLoss(0.2, 0.7, 100_000)}


@dataclass
class Machine:
    """A tiny model in place of the shipped one, and a cache. told: the lines that say that something is measured."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def best(self, known: KnownModel | None = None, **more: Any) -> DefaultModel:
        shipped = find(self.folder / "tiny.gguf")
        around = {"folder": self.cache, "processor": "one", "llama_cpp": "1: a build", "tell": self.told.append} | more
        return best(shipped, known or KnownModel("F32", 600_000, LOSSES), Surroundings(**around))

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir())

    def chosen_before(self, type_name: str = "Q8_0") -> Path:
        """Leaves the record of a choice, without its file. What is measured of so small a model may be anything."""
        self.cache.mkdir()
        shipped = find(self.folder / "tiny.gguf")
        speed = {"streams": {str(n): 1.0 for n in SLOTS}, "prompt": 1.0}
        tried = [
            {"type": name, "bytes": 1, "kl": 0.001, "same_top": 0.9, "speed": speed, "gain": gain, "least": gain}
            for name, gain in (("F32", 1.0), (type_name, 1.5))
        ]
        facts = {"processor": "one", "llama_cpp": "1: a build", "date": "2026-11-29 14:00:00 UTC", "tried": tried}
        record = record_path(shipped, Surroundings(self.cache, "one", "1: a build"))
        record.write_text(json.dumps({"source": shipped.digest, "type": type_name, "digest": "sha256:0", **facts}))
        return record


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    tiny_model(tmp_path / "tiny.gguf")
    return Machine(tmp_path)


# The choice


def tried(name: str, gain: float, least: float | None = None, kl: float = 0.005) -> TriedType:
    return TriedType(name, 1, kl, 0.9, Speed(dict.fromkeys(SLOTS, 1.0), 1.0), gain, gain if least is None else least)


@pytest.mark.parametrize(
    ("others", "wins"),
    [
        ([], "Q4_1"),
        ([tried("Q8_0", 1.3)], "Q8_0"),
        ([tried("Q8_0", 1.3), tried("BF16", 1.8)], "BF16"),
        ([tried("Q8_0", LEAST_GAIN - 0.01)], "Q4_1"),
        ([tried("Q8_0", 1.3), tried("BF16", 1.8, least=1.0)], "Q8_0"),  # of BF16 it is not clear
        ([tried("Q6_K", 1.3, kl=0.01), tried("Q8_0", 1.3 * ALIKE + 0.001)], "Q8_0"),  # alike: less loss
        ([tried("Q6_K", 1.3, kl=0.01), tried("Q8_0", 1.3 * ALIKE - 0.001)], "Q6_K"),
    ],
)
def test_the_fastest_by_enough_in_every_round_is_chosen(others: list[TriedType], wins: str) -> None:
    assert chosen([tried("Q4_1", 1.0, kl=0.0), *others]).type == wins


def test_an_unclear_measurement_chooses_nothing() -> None:
    with pytest.raises(SettingsError, match=r"speed of BF16 varied too much; the next start measures again"):
        chosen([tried("Q4_1", 1.0, kl=0.0), tried("BF16", 1.4, least=1.05), tried("Q8_0", 1.0)])


def test_the_table_that_ships_is_about_the_file_that_ships() -> None:
    shipped = find()
    known = known_models()[shipped.digest]
    assert (known.type, known.bytes) == (SourceModel.read(shipped.path).type, shipped.path.stat().st_size)
    assert [name for name, loss in known.types.items() if loss.kl <= MAX_KL] == ["BF16", "Q8_0", "Q6_K", "F16"]


# The cache


def test_it_is_measured_once(machine: Machine) -> None:
    first = machine.best()
    assert machine.told == ["Measuring once which type of the default model is the fastest on this machine: F16, Q8_0"]
    assert {path.removesuffix(".gguf").rpartition("-")[2] for path in machine.kept() if path.endswith(".gguf")} <= {
        "F16",
        "Q8_0",
    }
    second = machine.best()
    if first.record is None:  # so small a model's speed may vary too much
        assert "varied too much" in first.told and len(machine.told) == 2
        return
    assert (second, len(machine.told)) == (first, 1)
    assert first.shipped is (first.record.type == "F32")
    assert first.record.tried[0].type == "F32"
    assert {each.type for each in first.record.tried} <= {"F32", "F16", "Q8_0"}, "Q4_0 loses too much"
    assert find(first.path).digest == first.record.digest


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "not a model"])
def test_a_file_that_is_missing_or_damaged_is_written_again(machine: Machine, damage: str) -> None:
    machine.chosen_before()
    whole = machine.best()
    assert not whole.shipped and "as Q8_0, 1.5 times as fast here as the shipped file, with a KL of 0.0010" in whole.told
    content = bytearray(whole.path.read_bytes())
    content[-5] ^= 1
    match damage:
        case "missing":
            whole.path.unlink()
        case "cut":
            whole.path.write_bytes(content[:-100])
        case "flipped":
            whole.path.write_bytes(content)
        case _:
            whole.path.write_bytes(b"x")
    again = machine.best()
    assert (again, machine.told) == (whole, [])
    assert find(again.path).digest == whole.record.digest if whole.record else False


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b'{"source": 1}'])
def test_a_damaged_record_is_measured_anew(machine: Machine, content: bytes) -> None:
    machine.chosen_before().write_bytes(content)
    machine.best()
    assert len(machine.told) == 1


@pytest.mark.parametrize("other", [{"processor": "two"}, {"llama_cpp": "2: a build"}])
def test_another_processor_or_build_is_measured_anew(machine: Machine, other: dict[str, str]) -> None:
    record = machine.chosen_before()
    before = record.read_bytes()
    machine.best(**other)
    assert len(machine.told) == 1
    assert record.read_bytes() == before
    machine.best()
    assert len(machine.told) == 1


def test_of_several_at_once_one_works(machine: Machine) -> None:
    machine.chosen_before()
    with ThreadPoolExecutor(3) as pool:
        found = [each.result() for each in [pool.submit(machine.best) for _ in range(3)]]
    assert len({each.path for each in found}) == 1 and not found[0].shipped
    assert [name for name in machine.kept() if name.endswith((".draft", ".gguf"))] == [found[0].path.name]


def test_what_a_killed_process_left_is_removed(machine: Machine) -> None:
    machine.chosen_before()
    (machine.cache / ".BF16.draft").write_bytes(b"x")
    machine.best()
    assert not [name for name in machine.kept() if name.endswith(".draft")]


# Back to the shipped file


def shipped_because(found: DefaultModel, machine: Machine, why: str) -> None:
    assert found.shipped and found.path == machine.folder / "tiny.gguf"
    assert found.told.startswith("the shipped file, because ") and why in found.told, found.told


def test_an_unknown_file_is_served_as_it_is(machine: Machine) -> None:
    around = Surroundings(machine.cache, "one", "1: a build")
    shipped_because(best(find(machine.folder / "tiny.gguf"), None, around), machine, "no losses are known of this file")
    assert not machine.cache.exists()


def test_a_cache_that_cannot_be_written(machine: Machine) -> None:
    machine.cache.write_text("a file")
    shipped_because(machine.best(), machine, "Not a directory")
    machine.cache.unlink()
    machine.cache.symlink_to("/proc/nowhere")
    shipped_because(machine.best(), machine, str(machine.cache))


def test_too_little_space_is_known_before(machine: Machine) -> None:
    known = KnownModel("F32", 1, {"F16": TypeLoss(0.001, 0.99, 2**60)})
    shipped_because(machine.best(known), machine, f"too little memory, or too little space in {machine.cache}")


@pytest.mark.skipif(NO_DISK is not None, reason=NO_DISK or "")
def test_a_disk_that_becomes_full(machine: Machine) -> None:
    with small_disk(machine.folder / "disk", "100k") as disk:
        small = KnownModel("F32", 1, {"F16": TypeLoss(0.001, 0.99, 1)})
        shipped_because(machine.best(small, folder=disk / "cache"), machine, "is full")
        assert [path.name for path in (disk / "cache").iterdir()] == ["lock"]


def test_a_child_that_is_killed(machine: Machine) -> None:
    mine = set(descendants(os.getpid()))

    def kill(_what: str, _share: float) -> None:
        for pid in set(descendants(os.getpid())) - mine:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    shipped_because(machine.best(report=kill), machine, "llama.cpp ended with SIGKILL")
    assert machine.kept() == ["lock"]


def test_nobody_waits_for_ever(machine: Machine) -> None:
    machine.cache.mkdir()
    lock = file_locks.take(machine.cache / "lock", "")
    try:
        shipped_because(machine.best(patience=0.1), machine, "another process has measured for more than 0 s")
    finally:
        lock.release()


# The worker's settings


def test_models_without_a_path_get_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(
        f'pool = "p"\nnode = "n"\ntrust = "{"A" * 43}"\nkeys = "k"\nreceipt_key = "r"\ndefault_model = "fast.gguf"\n'
        '[nats]\nurl = "nats://127.0.0.1:4222"\ncredentials = "c"\n'
        '[[models]]\nthreads = 1\n[[models]]\nname = "mine"\n[[models]]\npath = "own.gguf"\n'
    )
    found = [(model.path, model.name) for model in load(path).models]
    fast = tmp_path / "fast.gguf"
    assert found == [(fast, "smollm2-135m"), (fast, "mine"), (tmp_path / "own.gguf", None)]
