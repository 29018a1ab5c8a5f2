"""A draft model: a small model that guesses what the served one will say. Both must have the same vocabulary.

Rules:
- It reads only what the served model reads, for the same task, in a context of its own. No task's cells serve another one: they
  are removed when it ends, and overwritten once nothing runs.
- It reads a prompt in pieces that take about as long as one more of its steps (`pace.py`), so it never stalls running answers.
  Until it has read all, its task has no guesses.
- Its failures cost guesses, never an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.drafting import Wanted
from lacre_backend.engine.model import MIN_N_CTX, Gpu, Model, ModelMetadata, Weights
from lacre_backend.engine.pace import Pace
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.protocol import EngineError
from lacre_backend.engine.tokenizer import Tokenizer

FIRST_READ: Final = 32  # tokens of all prompts in a step, before anything is measured
MOST_READ: Final = 256  # where steps cost almost nothing
# Tokens by which the vocabularies may differ in length: files of one family fill them up with unused tokens differently
PADDING: Final = 128
_WEIGHT: Final = 0.2  # of a new measurement in the running mean
_NAMED: Final = 3  # differences that an error names


class DraftVocabularyDiffers(SettingsError):
    """The draft model and the served one have different vocabularies, so a token of one means another text in the other."""

    remedy = "Use a draft model of the same family, or one that was distilled from the served model."


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A draft model to load. name: for errors. weights: of a sealed one, of which `path` has the head alone."""

    path: Path
    name: str
    weights: Weights | None = None


@dataclass(slots=True)
class _Sequence:
    """cells: how many there are. guessed: the tokens of the last ones, which the task did not have yet. read: the task's tokens
    before those.
    """

    slot: int
    read: int = 0
    guessed: tuple[int, ...] = ()

    @property
    def cells(self) -> int:
        return self.read + len(self.guessed)


class DraftModel:
    """A `Drafter`. Raises SettingsError if it cannot be loaded, and DraftVocabularyDiffers."""

    def __init__(self, file: DraftFile, target: Model, limits: EngineLimits, compute: Compute, gpu: Gpu) -> None:
        """limits: of the served model's context, which its own fits."""
        self.seconds = 0.0
        with closing(Tokenizer(file.path)) as tokenizer:  # a bad file may abort the process that reads it
            facts = ModelMetadata.read(file.path)
            if not (facts.cuttable and facts.generates):
                raise SettingsError(f"{file.name} cannot draft: its state cannot be taken back, or it does not generate.")
            context = min(limits.context, facts.n_ctx_most or limits.context)
            self._model = Model(
                file.path, name="draft", digest="", n_ctx=context, gpu=gpu, tokenizer=tokenizer, weights=file.weights
            )
        self._shared = check_vocabulary(file.name, self._model, target)
        cells = min(limits.cells, limits.slots * context)
        self._limits = replace(limits, context=context, cells=cells, drafts=0, chunk=min(limits.chunk, limits.step))
        self._context = LlamaContext(self._model, self._limits, compute)
        self._pace = Pace(FIRST_READ, MOST_READ)
        self._free = list(range(limits.slots))
        self._tasks: dict[str, _Sequence] = {}
        self._memory: list[Trim] = []

    def draft(self, wanted: Sequence[Wanted]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {task.id: [] for task in wanted if self._can(task)}
        asked = {task.id: task for task in wanted if task.id in found}
        try:
            current = self._read(list(asked.values()))
            while current:
                for task_id, token in current.items():
                    if token < self._shared:
                        found[task_id].append(token)
                more = [i for i, token in current.items() if token < self._shared and len(found[i]) < asked[i].most]
                current = self._guess({task_id: found[task_id][-1] for task_id in more})
        except EngineError:  # for example, no cells left: all begin again
            for task_id in list(self._tasks):
                self.forget(task_id)
        return {task_id: tokens for task_id, tokens in found.items() if tokens}

    def forget(self, task_id: str) -> None:
        if (sequence := self._tasks.pop(task_id, None)) is not None:
            self._free.append(sequence.slot)
            self._memory.append(Trim(sequence.slot, 0))

    def wipe(self) -> None:
        if not self._tasks:
            self._memory.clear()
            self._context.wipe()

    def close(self) -> None:
        self._context.free()

    def _can(self, task: Wanted) -> bool:
        return len(task.tokens) + task.most < self._limits.context and (task.id in self._tasks or bool(self._free))

    def _read(self, tasks: Sequence[Wanted]) -> dict[str, int]:
        """Reads what the tasks' answers have become. Returns the next token of those that were read to their end."""
        room = 2 * len(tasks) + self._pace.share(len(tasks))  # the last guess, and the token after it, are always read
        segments: list[Segment] = []
        for task in tasks:
            if task.id not in self._tasks:
                self._tasks[task.id] = _Sequence(self._free.pop())
            self._take_back(self._tasks[task.id], task)
        for task in sorted(tasks, key=lambda task: len(task.tokens) - self._tasks[task.id].read):  # short ones never wait
            sequence = self._tasks[task.id]
            missing = task.tokens.all[sequence.read : sequence.read + room].tolist()
            if missing and max(missing) < self._shared:
                whole = sequence.read + len(missing) == len(task.tokens)
                segments.append(Segment(sequence.slot, sequence.read, missing, task.id, whole))
                room -= len(missing)
        began = time.perf_counter()
        tokens = self._execute(segments)
        reading = sum(len(segment.tokens) for segment in segments) - len(segments)
        self._pace.observe(len(segments), reading, time.perf_counter() - began)
        for segment in segments:
            if segment.task is not None:
                self._tasks[segment.task].read += len(segment.tokens)
        return tokens

    def _take_back(self, sequence: _Sequence, task: Wanted) -> None:
        """Removes guesses that the answer did not confirm; keeps the others. At least the last token is read again."""
        said = task.tokens.all[sequence.read : sequence.read + len(sequence.guessed)].tolist()
        right = next((i for i, pair in enumerate(zip(said, sequence.guessed, strict=False)) if pair[0] != pair[1]), len(said))
        keep = min(sequence.read + right, len(task.tokens) - 1)
        if keep < sequence.cells:
            self._memory.append(Trim(sequence.slot, keep))
        sequence.read, sequence.guessed = keep, ()

    def _guess(self, last: dict[str, int]) -> dict[str, int]:
        """One more token for each task. last: their guesses so far end with these."""
        if not last:
            return {}
        began = time.perf_counter()
        segments = []
        for task_id, token in last.items():
            sequence = self._tasks[task_id]
            segments.append(Segment(sequence.slot, sequence.cells, (token,), task_id, True))
            sequence.guessed += (token,)
        tokens = self._execute(segments)
        took = time.perf_counter() - began
        self._pace.observe(len(segments), 0, took)
        self.seconds = took if self.seconds == 0 else self.seconds + _WEIGHT * (took - self.seconds)
        return tokens

    def _execute(self, segments: list[Segment]) -> dict[str, int]:
        """Returns the best next token of each segment with an output."""
        memory, self._memory = tuple(self._memory), []
        segments.sort(key=lambda segment: segment.slot)
        rows = self._context.execute(StepPlan(memory, tuple(segments), (), (), len(segments)))
        outputs = [segment.task for segment in segments if segment.output]
        if not outputs:
            return {}
        best = self._context.logits(len(rows)).argmax(axis=1)
        return {task: int(token) for task, token in zip(outputs, best, strict=True) if task is not None}


def check_draft(file: DraftFile, served: Path) -> None:
    """Compares the vocabularies of both files. It loads no weights. Raises SettingsError."""
    with closing(Tokenizer(file.path)) as tokenizer, closing(Tokenizer(served)) as other:
        draft, target = (
            Model(path, name=file.name, digest="", n_ctx=MIN_N_CTX, gpu=Gpu(), tokenizer=one, vocab_only=True)
            for path, one in ((file.path, tokenizer), (served, other))
        )
        check_vocabulary(file.name, draft, target)


def check_vocabulary(name: str, draft: Model, target: Model) -> int:
    """How many tokens both have; each means the same. name: of the draft's file. Raises DraftVocabularyDiffers."""
    shared = min(draft.n_vocab, target.n_vocab)
    if max(draft.n_vocab, target.n_vocab) - shared > PADDING:
        raise DraftVocabularyDiffers(
            f"The draft model {name} has {draft.n_vocab} tokens, and the served model {target.n_vocab}: not one vocabulary."
        )
    differ = [i for i in range(shared) if draft.piece(i) != target.piece(i) or draft.ends(i) != target.ends(i)]
    control = [{one.id: one.text for one in model.info.control_tokens if one.id < shared} for model in (draft, target)]
    if control[0] != control[1]:
        differ += sorted(i for i in control[0].keys() | control[1].keys() if control[0].get(i) != control[1].get(i))
    if differ:
        some = ", ".join(map(str, differ[:_NAMED]))
        raise DraftVocabularyDiffers(
            f"The draft model {name} has another vocabulary than the served model: {len(differ)} tokens differ, such as {some}."
        )
    return shared
