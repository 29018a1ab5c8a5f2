"""`lacre model inspect`: what a file holds, which files are refused; and that a death ends only the child."""

from __future__ import annotations

import json
import os
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.model import commands
from lacre_backend.workshop.adapter_inspection import INSPECT_FILE, FileAsked
from lacre_backend.workshop.child import Job, JobFailed, Report, run
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.inspection import InspectAsked, Inspected
from parts.tiny_model import TEMPLATE, tiny_model


def inspected(path: Path, report: Report = lambda _what, _share: None) -> Inspected:
    found = run(INSPECT_FILE, FileAsked(InspectAsked(path)), report).model
    assert found is not None
    return found


def test_a_whole_file_is_described(tmp_path: Path) -> None:
    shares: list[float] = []
    path = tiny_model(tmp_path / "tiny.gguf", template=TEMPLATE)
    found = inspected(path, lambda _, share: shares.append(share))
    assert (found.architecture, found.kind, found.layers, found.embedding) == ("llama", "generate", 2, 64)
    assert found.bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert found.types["F32"].parameters == found.parameters > 0
    assert found.template
    assert not found.faults
    assert found.node.fits
    assert shares == sorted(shares)
    assert len(shares) > 2


def test_json_has_the_same_members(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf")
    printed = CliRunner().invoke(commands, ["inspect", str(path), "--json"])
    assert printed.exit_code == 0
    assert set(json.loads(printed.stdout)) == {*Inspected.__slots__}
    table = CliRunner().invoke(commands, ["inspect", str(path)])
    assert "tokens; the cache takes" in table.stdout


def test_no_template_is_a_fault_to_know_of(tmp_path: Path) -> None:
    assert any("no chat template" in fault for fault in inspected(tiny_model(tmp_path / "t.gguf", template="")).faults)


BYTES = {
    "empty": (lambda whole: b"", "ends within its head"),
    "other": (lambda whole: b"PK\x03\x04" + whole[4:], "does not begin as a GGUF file"),
    "big-endian": (lambda whole: whole[:4] + struct.pack(">I", 3) + whole[8:], "big-endian"),
    "obsolete": (lambda whole: whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
    "cut in the head": (lambda whole: whole[:2000], "ends within its head"),
    "cut in the tensors": (lambda whole: whole[:-4096], "is cut off"),
    "many pairs": (lambda whole: whole[:16] + struct.pack("<Q", 2**60) + whole[24:], "unknown type|ends within|claims"),
    "many tensors": (lambda whole: whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "claims .* tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_damaged_files_are_refused_by_cause(tmp_path: Path, name: str) -> None:
    change, said = BYTES[name]
    path = tiny_model(tmp_path / "tiny.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SettingsError, match=said):
        inspected(path)


def test_every_flipped_byte_of_the_head_is_survived(tmp_path: Path) -> None:
    """Refused or read: never a hang, and never an end of this process."""
    whole = tiny_model(tmp_path / "tiny.gguf").read_bytes()
    chosen = np.random.default_rng(7).choice(1500, 12, replace=False)
    for at in map(int, chosen):
        path = tmp_path / "flipped.gguf"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        try:
            assert inspected(path).parameters > 0
        except SettingsError as exc:
            assert len(str(exc)) > 20


@dataclass(frozen=True, slots=True)
class Asked:
    path: Path


@dataclass(frozen=True, slots=True)
class Told:
    secret: str


def dies(asked: Asked, report: Report) -> Told:
    report("dying", 0.5)
    os.write(2, b"GGML_ASSERT(x) failed\n")
    os.kill(os.getpid(), signal.SIGABRT)
    return Told("never")


def fails(asked: Asked, report: Report) -> Told:
    asked.path.read_bytes()
    return Told("never")


DIES = Job(f"{__name__}:DIES", Asked, Told, dies)
FAILS = Job(f"{__name__}:FAILS", Asked, Told, fails)


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a child import the jobs above."""
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}{os.pathsep}{tests}")


@pytest.mark.usefixtures("reachable")
def test_a_death_ends_the_child_alone_and_is_told() -> None:
    with pytest.raises(JobFailed, match=r"SIGABRT .* GGML_ASSERT\(x\) failed\. Nothing was written"):
        run(DIES, Asked(Path("x")))


@pytest.mark.usefixtures("reachable")
def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent: No such file"):
        run(FAILS, Asked(tmp_path / "absent"))


def test_a_draft_replaces_its_place_only_when_whole(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"in")
    out.write_bytes(b"old")
    with pytest.raises(ValueError, match="half"), draft(out, [source]) as path:
        path.write_bytes(b"half")
        raise ValueError("half")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"in": b"in", "out": b"old"}
    with draft(out, [source]) as path:
        path.write_bytes(b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"in": b"in", "out": b"new"}


@pytest.mark.parametrize(
    ("out", "size", "said"),
    [("in", 0, "is the input itself"), (".", 0, "is a folder"), ("no/out", 0, "does not exist"), ("out", 2**60, "Make room")],
)
def test_a_draft_is_refused_before_any_work(tmp_path: Path, out: str, size: int, said: str) -> None:
    (tmp_path / "in").write_bytes(b"in")
    with pytest.raises(SettingsError, match=said), draft(tmp_path / out, [tmp_path / "in"], size=size):
        pytest.fail("it began")
    assert (tmp_path / "in").read_bytes() == b"in"
