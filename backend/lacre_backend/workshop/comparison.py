"""Compares two models on this machine: the job of `lacre model compare`. Also the figures that other jobs give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre_backend.workshop.child import Job, Report
from lacre_backend.workshop.fidelity import Fidelity, fidelity_to, read_text, reference
from lacre_backend.workshop.source import SourceModel, loaded
from lacre_backend.workshop.speed import Speed, gain, speeds


@dataclass(frozen=True, slots=True)
class CompareAsked:
    """text: None: the one that ships."""

    first: Path
    second: Path
    text: Path | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """One model. bytes: of all its files. type: of its mixture. fidelity: to the first model, which has no loss to itself."""

    path: Path
    bytes: int
    type: str
    fidelity: Fidelity
    speed: Speed


@dataclass(frozen=True, slots=True)
class Compared:
    """gain: how many times as fast the second is, the mean of all speeds."""

    first: Figures
    second: Figures
    gain: float


def figures(source: SourceModel, fidelity: Fidelity, speed: Speed) -> Figures:
    return Figures(source.path, source.bytes, source.type, fidelity, speed)


def compare(asked: CompareAsked, report: Report) -> Compared:
    """Raises OtherVocabulary, SettingsError or OSError."""
    report("reading", 0.0)
    text = read_text(asked.text)
    first, second = SourceModel.read(asked.first), SourceModel.read(asked.second)
    for each in (first, second):
        each.check_bytes()
    report("the first on the text", 0.05)
    with loaded(first.path) as model:
        expected = reference(first.path, model, text)
    report("the second on the text", 0.25)
    with loaded(second.path) as model:
        found = fidelity_to(expected, second.path, model)
    one, two = speeds([first.path, second.path], lambda share: report("speed", 0.45 + 0.55 * share))
    return Compared(figures(first, expected.fidelity, one), figures(second, found, two), gain(two, one))


COMPARE: Final = Job(f"{__name__}:COMPARE", CompareAsked, Compared, compare)
