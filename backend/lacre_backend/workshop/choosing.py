"""Which model of a folder suits a task, a memory and a loss: `lacre model choose`.

Rules:
- A file that cannot be read, or does not suit, stays in the table with its reason. Each is measured in a process of its own.
- A figure that was not measured is None. Nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import llama_cpp as L

from lacre.errors import SettingsError
from lacre_backend.engine import sizing
from lacre_backend.engine.model import ModelMetadata
from lacre_backend.engine.shards import files_of
from lacre_backend.engine.sizing import OVERHEAD, LlamaSettings
from lacre_backend.workshop.benchmark import BENCH, BenchAsked
from lacre_backend.workshop.child import Job, Report, run
from lacre_backend.workshop.comparison import COMPARE, CompareAsked
from lacre_backend.workshop.inspection import check_extents, mixture_of, read_header

MOST_FILES: Final = 200  # of a folder; each may take minutes to measure
_POOLED: Final = (L.LLAMA_POOLING_TYPE_MEAN, L.LLAMA_POOLING_TYPE_CLS, L.LLAMA_POOLING_TYPE_LAST)


class ModelTask(StrEnum):
    """What a model is for."""

    CHAT = "chat"
    EMBED = "embed"
    RERANK = "rerank"


@dataclass(frozen=True, slots=True)
class ChooseAsked:
    """memory: bytes for weights, caches and buffers; None: what is free. quality: the most KL to `reference`, in nats.

    reference: the model that the others' loss counts from. measure: whether speed and loss are measured.
    """

    folder: Path
    task: ModelTask
    memory: int | None = None
    quality: float | None = None
    reference: Path | None = None
    measure: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """- suits: whether it is for the task, fits, and keeps the bound; if not, reason says why.
    - memory: bytes that it takes with its caches. slots, context: None if it does not generate.
    - streams: tokens per second of 16 streams. prompt: of a prompt that is read. Embedding models read in both.
    - kl: the loss to the reference, in nats.
    """  # fmt: skip

    path: Path
    suits: bool
    reason: str | None = None
    type: str | None = None
    bytes: int | None = None
    memory: int | None = None
    slots: int | None = None
    context: int | None = None
    streams: float | None = None
    prompt: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """candidates: the suitable ones first, the fastest of them before all. chosen: None if nothing suits."""

    chosen: Path | None
    candidates: list[Candidate]


def choose(asked: ChooseAsked, report: Report) -> ChosenModel:
    """Raises SettingsError if the question contradicts itself or the folder has no model, or OSError."""
    _check(asked)
    paths = list(_models(asked.folder))
    if not paths:
        raise SettingsError(f"{asked.folder} holds no GGUF file. Give a folder with models.")
    if len(paths) > MOST_FILES:
        raise SettingsError(f"{asked.folder} holds {len(paths)} models; at most {MOST_FILES} are compared at a time.")
    found = []
    for number, path in enumerate(paths):
        report(path.name, number / len(paths))
        candidate = run(LOOK, replace(asked, folder=path))
        if candidate.suits and asked.measure and asked.task is not ModelTask.RERANK:
            candidate = _measured(candidate, asked)
        found.append(candidate)
    found.sort(key=lambda each: (not each.suits, -(each.streams or 0), each.bytes or 0))
    return ChosenModel(found[0].path if found[0].suits else None, found)


def _check(asked: ChooseAsked) -> None:
    if not asked.folder.is_dir():
        raise SettingsError(f"No such folder: {asked.folder}. Check the path.")
    if asked.quality is not None and (asked.reference is None or not asked.measure):
        raise SettingsError("--quality bounds the loss to a reference. Give it with --reference, and leave --no-measure away.")
    if asked.reference is not None and asked.task is not ModelTask.CHAT:
        raise SettingsError("The loss to a reference is measured for --task chat alone. Leave --reference away.")
    if asked.memory is not None and asked.memory <= OVERHEAD:
        raise SettingsError(f"--memory is {asked.memory:,} bytes; llama.cpp's buffers alone take {OVERHEAD:,}.")


def _models(folder: Path) -> Iterator[Path]:
    """The first file of each model. Of a split model whose files are not all there, each is told of."""
    for path in sorted(folder.glob("*.gguf")):
        try:
            if files_of(path)[0] == path:
                yield path
        except SettingsError:
            yield path


def _measured(candidate: Candidate, asked: ChooseAsked) -> Candidate:
    """With its speed, and with its loss if there is a reference."""
    try:
        speed = run(BENCH, BenchAsked(candidate.path, rounds=1))
        candidate = replace(candidate, streams=speed.rates[-1].tokens_per_second, prompt=speed.prompt_tokens_per_second)
        if asked.reference is not None:
            same = candidate.path.samefile(asked.reference)
            loss = 0.0 if same else run(COMPARE, CompareAsked(asked.reference, candidate.path)).second.fidelity.kl
            candidate = replace(candidate, kl=round(loss, 5))
    except SettingsError as exc:
        return replace(candidate, suits=False, reason=str(exc))
    if asked.quality is not None and candidate.kl is not None and candidate.kl > asked.quality:
        return replace(candidate, suits=False, reason=f"its loss is above {asked.quality}")
    return candidate


# In the child


def look(asked: ChooseAsked, _report: Report) -> Candidate:
    """folder: here, the model itself."""
    path = asked.folder
    try:
        files = files_of(path)
        headers = [read_header(file) for file in files]
        for file, header in zip(files, headers, strict=True):
            check_extents(file, header)
        facts = ModelMetadata.read(path)
        candidate = Candidate(path, True, None, mixture_of(headers[0]), sum(file.stat().st_size for file in files))
        task = _task(facts)
        if task is not asked.task:
            return replace(candidate, suits=False, reason=f"it is for {task or 'neither chat, embed nor rerank'}")
        return _fitted(candidate, facts, asked)
    except SettingsError as exc:
        return Candidate(path, False, str(exc))


LOOK: Final = Job(f"{__name__}:LOOK", ChooseAsked, Candidate, look)


def _task(facts: ModelMetadata) -> ModelTask | None:
    if facts.pooling == L.LLAMA_POOLING_TYPE_RANK:
        return ModelTask.RERANK
    if facts.pooling is not None:
        return ModelTask.EMBED if facts.pooling in _POOLED else None
    return ModelTask.CHAT if facts.generates else None


def _fitted(candidate: Candidate, facts: ModelMetadata, asked: ChooseAsked) -> Candidate:
    weights = candidate.bytes or 0
    if asked.task is ModelTask.CHAT:
        sized = sizing.derive(candidate.path, LlamaSettings(), available=asked.memory)
        memory = weights + OVERHEAD + sized.cache_bytes
        return replace(candidate, memory=memory, slots=sized.limits.slots, context=sized.limits.context)
    sizing.memory_for_caches(candidate.path, facts, LlamaSettings(), available=asked.memory)
    return replace(candidate, memory=weights + OVERHEAD)
