"""Quantizes a model and measures the loss and the speed on this machine: `lacre model quantize`.

Rules:
- The parent keeps the draft's place and removes what a dead child leaves. The child writes, tries and measures.
- A file that llama.cpp cannot load, or that computes values that are not numbers, is never renamed into place.
- `--auto` tries every type of `AUTOMATIC` and keeps the fastest within the bound. If the source is the fastest, its weights are
  copied, so that the next command finds a file.
- The source is measured beside each type, in turns, so that the gains can be compared.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import llama_cpp as L
from llama_cpp.llama_cpp import _lib as _llama

from lacre.errors import SettingsError
from lacre_backend.engine.graph import Values
from lacre_backend.engine.model import Model
from lacre_backend.models.gguf import FileDigests
from lacre_backend.workshop.child import Job, Report, run
from lacre_backend.workshop.comparison import Figures, figures
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.fidelity import Reference, fidelity_to, read_text, reference
from lacre_backend.workshop.importance import importance_matrix
from lacre_backend.workshop.inspection import fell_back_in
from lacre_backend.workshop.rewriting import COPY, NEED_MATRIX, Rewriting, known_type, rewrite
from lacre_backend.workshop.source import SourceModel, files_at, loaded
from lacre_backend.workshop.speed import Speed, better, gain, speeds

AUTOMATIC: Final = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")
WITH_MATRIX: Final = ("IQ4_NL",)  # also tried then: without one it loses more than Q4_K_M, and takes a minute to write
MAX_KL: Final = 0.02  # nats: about one token in twenty has another top token
_TRIAL: Final = ".trial"  # ends the name of the file that is being tried


@dataclass(frozen=True, slots=True)
class QuantizeAsked:
    """types: to try. max_kl: the bound; None: none. out: a draft. calibrate, text: None: no matrix; the text that ships."""

    path: Path
    out: Path
    types: tuple[str, ...]
    max_kl: float | None = None
    requantize: bool = False
    calibrate: Path | None = None
    text: Path | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One type. beside: the source's speed, measured in turns with it. gain: how many times as fast as that. fell_back: tensors
    of another type, because their rows are no multiple of 256. seconds: of writing it.
    """

    figures: Figures
    beside: Speed
    gain: float
    fell_back: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Quantized:
    """digest: of the new file, `sha256:` and hex. type: which of those tried it has. max_kl: the bound, if there was one.

    source: its speed is the best of those measured beside the types. checked: whether it has a checksum, which matches.
    """

    out: Path
    type: str
    digest: str
    max_kl: float | None
    source: Figures
    tried: list[Trial]
    checked: bool


def quantize(asked: QuantizeAsked, report: Report) -> Quantized:
    """Writes `asked.out` in a child. Raises SettingsError, OSError or JobFailed; then nothing is left behind."""
    files = files_at(asked.path)
    with draft(asked.out, files) as path:
        try:
            told = run(QUANTIZE, replace(asked, out=path), report)
        finally:
            with suppress(FileNotFoundError):
                _trial_of(path).unlink()
    tried = [replace(trial, figures=replace(trial.figures, path=asked.out)) for trial in told.tried]
    return replace(told, out=asked.out, tried=tried)


def _quantize(asked: QuantizeAsked, report: Report) -> Quantized:
    report("reading", 0.0)
    text, source = read_text(asked.text), SourceModel.read(asked.path)
    types = tuple(name for name in map(known_type, asked.types) if len(asked.types) == 1 or name != source.type)
    _check(asked, source, types)
    checked = source.check_bytes()
    source.check_weights()
    report("the source on the text", 0.05)
    with loaded(source.path) as model:
        expected = reference(source.path, model, text)
        matrix = {} if asked.calibrate is None else _calibrated(source, model, asked.calibrate, report)
    trials: dict[str, Trial] = {}
    best = None
    for number, name in enumerate(types):
        part = _part(report, name, 0.2 + 0.8 * number / len(types), 0.8 / len(types))
        trial = trials[name] = _try(source, expected, _trial_of(asked.out), Rewriting(name, matrix), part)
        if is_better(trial, trials.get(best or ""), asked.max_kl):
            best = name
            _trial_of(asked.out).replace(asked.out)
    if best is None:
        rewrite(source.path, asked.out, Rewriting(COPY), lambda _share: None)
    digest = "sha256:" + FileDigests.read([asked.out]).model
    fastest = functools.reduce(better, (trial.beside for trial in trials.values()))
    measured = figures(source, expected.fidelity, fastest)
    written = source.type if best in (None, COPY) else best
    return Quantized(asked.out, written, digest, asked.max_kl, measured, list(trials.values()), checked)


QUANTIZE: Final = Job(f"{__name__}:QUANTIZE", QuantizeAsked, Quantized, _quantize)


def _trial_of(out: Path) -> Path:
    return out.with_name(out.name + _TRIAL)


def _part(report: Report, name: str, begin: float, share: float) -> Callable[[str, float], None]:
    return lambda what, done: report(f"{name}: {what}", begin + share * done)


def _check(asked: QuantizeAsked, source: SourceModel, types: tuple[str, ...]) -> None:
    """Raises SettingsError for what would be refused later, or give a useless model."""
    quantized = {tensor.kind for tensor in source.tensors if int(_llama.ggml_blck_size(tensor.kind)) > 1}
    if quantized and not asked.requantize and types != (COPY,):
        raise SettingsError(
            f"{asked.path} is quantized already ({source.type}), and quantizing it again adds to the loss. "
            "Use the model that it was made from; or add --requantize, to measure the loss from here."
        )
    for name in types:
        if name in NEED_MATRIX and asked.calibrate is None:
            raise SettingsError(f"{name} needs an importance matrix. Add --calibrate TEXT, or give a type of more bits.")
    least, free = min(_least_bytes(source, name) for name in types), _free(asked.out)
    if least > free:
        raise SettingsError(
            f"{asked.out.parent} has {free / 2**20:,.1f} MiB free, and the output takes {least / 2**20:,.1f} MiB or more. "
            "Make room, or give another --out."
        )


def _free(out: Path) -> int:
    return shutil.disk_usage(out.parent).free


def _least_bytes(source: SourceModel, name: str) -> int:
    """What the matrices take in the smallest type of a mixture; 0 if its name does not tell."""
    kind = getattr(L, f"GGML_TYPE_{name}", None) or getattr(L, f"GGML_TYPE_{name.rpartition('_')[0]}", None)
    if kind is None:
        return 0
    _llama.ggml_row_size.restype, _llama.ggml_row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    block = int(_llama.ggml_blck_size(kind))
    elements = sum(tensor.elements for tensor in source.tensors if len(tensor.shape) > 1)
    return int(_llama.ggml_row_size(kind, elements // block * block))


def _calibrated(source: SourceModel, model: Model, path: Path, report: Report) -> dict[str, Values]:
    return importance_matrix(source, model, read_text(path), lambda share: report("the importance matrix", 0.1 + 0.1 * share))


def _try(source: SourceModel, expected: Reference, out: Path, wanted: Rewriting, report: Callable[[str, float], None]) -> Trial:
    """Writes `out` and measures it, in turns with the source."""
    began = time.perf_counter()
    rewrite(source.path, out, wanted, lambda share: report("writing", 0.3 * share))
    seconds = time.perf_counter() - began
    written = SourceModel.read(out)
    written.check_weights()
    report("on the text", 0.3)
    with loaded(out) as model:
        fidelity = fidelity_to(expected, out, model)
    before, after = speeds([source.path, out], lambda share: report("speed", 0.5 + 0.5 * share))
    fallen = len(fell_back_in(written.type, written.tensors))
    return Trial(figures(written, fidelity, after), before, gain(after, before), fallen, seconds)


def is_better(trial: Trial, best: Trial | None, max_kl: float | None) -> bool:
    """With a bound, a type must also be faster than the source."""
    if max_kl is None:
        return True
    return trial.figures.fidelity.kl <= max_kl and trial.gain > (1.0 if best is None else best.gain)
