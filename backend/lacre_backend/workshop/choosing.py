"""Which model of a folder suits a task, a memory and a loss: `lacre model choose`.

Rules:
- A file that cannot be read, or does not suit, stays in the table with its reason. Each is measured in a process of its own.
- A figure that was not measured is None. Nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import llama_cpp as L

from lacre.errors import SettingsError
from lacre_backend.engine import sizing
from lacre_backend.engine.model import ModelMetadata
from lacre_backend.engine.shards import files_of
from lacre_backend.engine.sizing import OVERHEAD, LlamaSettings
from lacre_backend.workshop.benchmark import BENCH, BenchAsked
from lacre_backend.workshop.child import Job, JobFailed, Report, run
from lacre_backend.workshop.examples import Examples, ModelTask, read_examples
from lacre_backend.workshop.inspection import check_extents, check_weights, mixture_of, read_header
from lacre_backend.workshop.judging import ANSWERS, JUDGE, LOSS, JudgeAsked, LossAsked, ReferenceAnswer, Score

MOST_FILES: Final = 200  # of a folder; each may take minutes to measure
_POOLED: Final = (L.LLAMA_POOLING_TYPE_MEAN, L.LLAMA_POOLING_TYPE_CLS, L.LLAMA_POOLING_TYPE_LAST)


@dataclass(frozen=True, slots=True)
class ChooseAsked:
    """memory: bytes for weights, caches and buffers; None: what is free. quality: the most KL to `reference`, in nats.

    reference: the model that the others' loss counts from. measure: whether speed and loss are measured. examples: a file of
    the task's own examples. min_score: the least that a model reaches on them.
    """

    folder: Path
    task: ModelTask
    memory: int | None = None
    quality: float | None = None
    reference: Path | None = None
    measure: bool = True
    examples: Path | None = None
    min_score: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """- suits: whether it is for the task, fits, and keeps the bound; if not, reason says why.
    - memory: bytes that it takes with its caches. slots, context: None if it does not generate.
    - streams: tokens per second of 16 streams. prompt: of a prompt that is read. Embedding models read in both.
      Rerankers only read: the examples.
    - kl: the loss to the reference, in nats: on the answers to the examples if there are any, else on the text that ships.
    - score: on the examples.
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
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """candidates: the suitable ones first. The best comes before all: by score if there are examples, without a least one, and
    then by speed. chosen: None if nothing suits.
    """

    chosen: Path | None
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True)
class _Trial:
    """What each candidate is measured with. answers: of the reference to the examples."""

    asked: ChooseAsked
    examples: Examples | None
    answers: list[ReferenceAnswer]


def choose(asked: ChooseAsked, report: Report) -> ChosenModel:
    """Raises SettingsError if the question contradicts itself, the folder has no model or the examples are wrong; OSError."""
    _check(asked)
    paths = list(_models(asked.folder))
    if not paths:
        raise SettingsError(f"{asked.folder} holds no GGUF file. Give a folder with models.")
    if len(paths) > MOST_FILES:
        raise SettingsError(f"{asked.folder} holds {len(paths)} models; at most {MOST_FILES} are compared at a time.")
    trial = _trial(asked, report)
    found = []
    for number, path in enumerate(paths):
        told = _within(report, path.name, number, len(paths))
        told("its head", 0.0)
        try:
            candidate = run(LOOK, replace(asked, folder=path))
        except JobFailed as exc:
            candidate = Candidate(path, False, str(exc))
        if candidate.suits and asked.measure:
            candidate = _measured(candidate, trial, told)
        found.append(candidate)
    found.sort(key=lambda each: _order(each, by_score=asked.min_score is None))
    return ChosenModel(found[0].path if found[0].suits else None, found)


def _order(each: Candidate, *, by_score: bool) -> tuple[bool, float, float, int]:
    """The best first."""
    score = each.score.value if by_score and each.score is not None else 0.0
    return not each.suits, -score, -(each.streams or each.prompt or 0.0), each.bytes or 0


def _within(report: Report, name: str, number: int, count: int) -> Report:
    """Reports the shares of one file's work as those of all."""
    return lambda what, share: report(f"{name}: {what}", (number + share) / count)


def _check(asked: ChooseAsked) -> None:
    if asked.folder.is_file():
        raise SettingsError(f"{asked.folder} is a file. Give the folder that it is in.")
    if not asked.folder.is_dir():
        raise SettingsError(f"No such folder: {asked.folder}. Check the path.")
    if asked.quality is not None and (asked.reference is None or not asked.measure):
        raise SettingsError("--quality bounds the loss to a reference. Give it with --reference, and leave --no-measure away.")
    if asked.reference is not None and asked.task is not ModelTask.CHAT:
        raise SettingsError("The loss to a reference is measured for --task chat alone. Leave --reference away.")
    if asked.memory is not None and asked.memory <= OVERHEAD:
        raise SettingsError(f"--memory is {asked.memory:,} bytes; llama.cpp's buffers alone take {OVERHEAD:,}.")
    if asked.examples is not None and not asked.measure:
        raise SettingsError("--examples are measured. Leave --no-measure away.")
    if asked.min_score is not None and asked.examples is None:
        raise SettingsError("--min-score is the least score on examples. Give it with --examples.")
    if asked.min_score is not None and not -1 <= asked.min_score <= 1:
        raise SettingsError(f"--min-score is {asked.min_score}; scores are at most 1. Give 0.9 for 90 %.")


def _trial(asked: ChooseAsked, report: Report) -> _Trial:
    """Reads the examples before anything is measured, and asks the reference once."""
    if asked.examples is None:
        return _Trial(asked, None, [])
    examples = read_examples(asked.examples, asked.task)
    if asked.reference is None:
        for example in examples.chat:
            if not example.expected:
                raise SettingsError(f"Line {example.line} of {asked.examples} has no `expected`. Give it, or give --reference.")
        return _Trial(asked, examples, [])
    answers = run(ANSWERS, JudgeAsked(asked.reference, examples), lambda what, _share: report(what, 0.0)).answers
    return _Trial(asked, examples, answers)


def _models(folder: Path) -> Iterator[Path]:
    """The first file of each model. Of a split model whose files are not all there, each is told of."""
    for path in sorted(folder.glob("*.gguf")):
        try:
            if files_of(path)[0] == path:
                yield path
        except SettingsError:
            yield path


def _measured(candidate: Candidate, trial: _Trial, report: Report) -> Candidate:
    """With its speed, its score on the examples, and its loss if there is a reference."""
    asked = trial.asked
    try:
        if asked.task is not ModelTask.RERANK:  # `bench` measures no rerankers
            speed = run(BENCH, BenchAsked(candidate.path, rounds=1), _part(report, 0.0))
            candidate = replace(candidate, streams=speed.rates[-1].tokens_per_second, prompt=speed.prompt_tokens_per_second)
        if trial.examples is not None:
            candidate = _scored(candidate, trial.examples, _part(report, 0.3))
        if asked.reference is not None:
            candidate = replace(candidate, kl=round(_loss(candidate.path, asked.reference, trial, _part(report, 0.6)), 5))
    except SettingsError as exc:
        return replace(candidate, suits=False, reason=str(exc))
    if asked.quality is not None and candidate.kl is not None and candidate.kl > asked.quality:
        return replace(candidate, suits=False, reason=f"its loss is above {asked.quality}")
    if asked.min_score is not None and candidate.score is not None and candidate.score.value < asked.min_score:
        return replace(candidate, suits=False, reason=f"its score is below {asked.min_score}")
    return candidate


def _part(report: Report, begin: float) -> Report:
    return lambda what, share: report(what, begin + 0.3 * share)


def _scored(candidate: Candidate, examples: Examples, report: Report) -> Candidate:
    """Chat examples without any right answer are for the loss alone."""
    with_answer = tuple(example for example in examples.chat if example.expected)
    if examples.chat and not with_answer:
        return candidate
    score = run(JUDGE, JudgeAsked(candidate.path, replace(examples, chat=with_answer)), report)
    return replace(candidate, score=score, prompt=score.tokens_per_second or candidate.prompt)


def _loss(path: Path, reference: Path, trial: _Trial, report: Report) -> float:
    if path.samefile(reference):
        return 0.0
    return run(LOSS, LossAsked(reference, path, trial.answers), report).kl


# In the child


def look(asked: ChooseAsked, _report: Report) -> Candidate:
    """folder: here, the model itself."""
    path = asked.folder
    try:
        files = files_of(path)
        headers = [read_header(file) for file in files]
        for file, header in zip(files, headers, strict=True):
            check_extents(file, header)
        check_weights(path, headers)
        if headers[0].text("general.type") == "adapter":
            return Candidate(path, False, "it is an adapter, not a model", bytes=path.stat().st_size)
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
