"""Decides which tokens of which tasks enter the next step. A state machine: tasks in, a plan out, results back in.

Rules:
- Pure: no I/O, clock, thread or llama.cpp. The caller executes each plan whole, reports, and asks for the next.
- Every step has the next token of each running task of its adapter. Prompts use the rest of the step, within a bounded share.
  So a long prompt never stalls the running tasks, and short prompts do not wait behind it.
- It never plans more cells than exist. If running tasks outgrow them, idle caches are removed first. Then a task returns to its
  queue with its generated tokens, to be recomputed: the youngest of the tenant that holds most cells. The oldest task always
  advances.
- Only the pseudonyms of tenant and caller decide whose turn it is (`turns.py`). This applies to admission, to the order of
  prompts, and to tasks that return to the queue.
- The scope and the adapter alone decide about reuse. Cells are reused within one scope and adapter, and between the choices of
  one request, which read their prompt once (`choices.py`). Cells without a scope are removed when their request ends.
- A step has one adapter's tasks, or the base's, and adapters take turns (`adapter_turns.py`). The others wait for their turn.
  An adapter's tasks run in neighbouring slots where possible (`placement.py`).
- A step's cost depends on the number of slots and of its tokens, never on context length. Cells are counts (`cells.py`), and
  tokens are never copied whole. Prefixes are compared by digests (`tokens.py`).
- An answer is read again if it is resumed here or was sent back to its queue. A step then takes at most `PIECE` of its tokens
  and none of its prompt's. llama.cpp computes attention to longer texts with another kernel, whose different rounding changes
  logits (measured: by up to 1.6). In such pieces the text continues as if nothing had been cut.
- A plan lists tokens by ascending slot. With a split cache llama.cpp computes neighbouring sequences together, and starts again
  at every gap. Measured: 8 of 16 slots take 35 ms a step with gaps, 13 without.
- llama.cpp's CPU kernels process rows in fours, and single rows cost much more (7 sequences take 30 ms, 8 take 24). So other
  slots get one filler token (`fillers.py`): those in gaps, and those next to the running ones if that makes the count round.
- An idle cache that loses its slot is copied out first (`saved.py`), and back when its scope asks for it. A step moves few
  tokens in that way while others generate. A task whose cache was copied back is read from the next step on: it may be `lost`.
- A step that reads no prompt may check drafted tokens: guesses of the next ones (`speculation.py`). They take free cells only,
  and at most `drafts` of a step. `advance` confirms them one by one; the cells of wrong ones are removed before the next step.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from lacre.errors import UsageError
from lacre_backend.engine.adapter_turns import AdapterTurns, Runner
from lacre_backend.engine.cells import Cells
from lacre_backend.engine.choices import Choices
from lacre_backend.engine.drafting import MAX_DRAFT
from lacre_backend.engine.fillers import filled
from lacre_backend.engine.plan import Copy, Discard, EngineLimits, MemoryStep, Restore, Save, Segment, StepPlan, Trim
from lacre_backend.engine.reuse import FoundCells, Reuse
from lacre_backend.engine.saved import MIN_SAVED, SavedCache, SavedCaches
from lacre_backend.engine.slots import CacheSlot, QueuedTask, age, unread, weight
from lacre_backend.engine.tokens import Tokens
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue

MARGIN: Final = 32  # free cells per running task before another is admitted, so that it is not sent back at once
COMPARED: Final = 64  # prefixes compared per step, about 4 us each; later tasks wait for the next step
MOVED: Final = 2048  # tokens copied out or back in a step while others generate; further tasks wait for the next step
PIECE: Final = 63  # tokens: from 64 of one sequence on, ggml's flash attention on CPUs computes in tiles
NO_DRAFTS: Final[Mapping[str, Sequence[int]]] = MappingProxyType({})


class Scheduler:
    """The state machine. It knows a task from `submit` to `end`."""

    def __init__(self, limits: EngineLimits, pace: Callable[[int, int, str | None], int] | None = None) -> None:
        """pace: `Pace.share`, asked at each step. None: `share` is a constant."""
        self.limits = limits
        self.share = limits.share
        self._pace = pace
        self._slots = [CacheSlot(i) for i in range(limits.slots)]
        self._tasks: dict[str, QueuedTask] = {}
        self._turns: FairQueue[QueuedTask] = FairQueue()
        self._adapter_turns = AdapterTurns()
        self._groups: dict[str, Choices[QueuedTask]] = {}
        self._cells = Cells(limits.slots, limits.cells, unified=limits.unified)
        self._count = 0
        self._memory: list[MemoryStep] = []
        self._saved = SavedCaches(limits.saved)
        self._reuse = Reuse(self._slots, self._saved, cuttable=limits.cuttable)
        self._moved = 0  # tokens copied out or back in this step

    # Input

    def submit(
        self,
        task_id: str,
        prompt: Sequence[int] | Tokens,
        scope: bytes | None,
        begun: Sequence[int] = (),
        fair: Fair = NOBODY,
        *,
        group: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Adds a task: a prompt that fits the context, the begun tokens of its answer, and an unused id.

        fair: for fairness. group: the choices of one request, which have the same tokens and adapter. A caller's thread may
        build the `Tokens` to save this one the work.
        """
        tokens = prompt if isinstance(prompt, Tokens) else Tokens(prompt, begun)
        if task_id in self._tasks or not 0 < len(tokens) < self.limits.context:
            raise UsageError("The task's id is in use, or its prompt does not fit.")
        choices = None if group is None else self._groups.setdefault(group, Choices(len(tokens)))
        if choices is not None:
            choices.members += 1
        task = self._tasks[task_id] = QueuedTask(task_id, tokens, scope, fair, choices)
        task.adapter = adapter
        self._turns.add(fair, task_id, task)

    def end(self, task_id: str, *, keep: bool = True) -> None:
        """The task is over. keep: whether its scope may reuse the computed cells."""
        task = self._tasks.pop(task_id)
        if task.slot is not None:
            self._turns.release(task.fair)
            slot, task.slot = task.slot, None
            slot.task = None
            slot.used = self._tick()
            self._undraft(slot)
            if not keep or task.scope is None:
                self._trim(slot, self._reuse.of_choices(slot, task) if keep else 0)
        elif task.choices is None or task not in task.choices.waiting:
            self._turns.drop(task.fair, task_id)
        if task.choices is not None:
            self._leave(task, task.choices)

    def advance(self, task_id: str, token: int) -> bool:
        """The task's segment produced this token, and the task continues.

        Returns whether the next token was drafted, so that the same step computed the logits behind it.
        """
        task = self._tasks[task_id]
        task.tokens.append(token)
        task.generated += 1
        slot = task.slot
        if slot is None or not slot.drafted:
            return False
        if slot.drafted[0] != token:
            self._undraft(slot)
            return False
        slot.drafted = slot.drafted[1:]
        slot.length += 1
        return True

    def forget(self, scope: bytes) -> None:
        """Removes a scope's cache. Running tasks continue."""
        for slot in self._slots:
            if slot.idle and slot.scope == scope:
                self._trim(slot, 0)
        self._memory += map(Discard, self._saved.forget(scope))

    def lost(self, step: Restore) -> None:
        """The last plan's step failed, and its slot is empty: the task's prompt is read, and the copy removed."""
        task = self._tasks[step.task]
        slot = task.slot
        if step.number in self._saved:
            self._saved.take(step.number)
            self._memory.append(Discard(step.number))
        if slot is None or not slot.restored:
            return
        if task.cached == slot.restored:
            task.cached = 0
        if task.choices is not None and task.choices.cached == slot.restored:
            task.choices.cached = 0
        self._cells.cut(slot.index, 0)
        slot.length = slot.restored = 0
        task.long = unread(slot) > self.limits.burst

    # State

    def cached(self, task_id: str) -> int:
        """Prompt tokens that came from the cache."""
        return self._tasks[task_id].cached or 0

    def started(self, task_id: str) -> bool:
        return self._tasks[task_id].cached is not None

    @property
    def free_cells(self) -> int:
        return self._cells.free

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(slot.task.id for slot in self._slots if slot.task is not None)

    @property
    def waiting(self) -> tuple[str, ...]:
        beside = (task for choices in self._groups.values() for task in choices.waiting)
        return tuple(task.id for task in itertools.chain(self._turns, beside))

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    @property
    def generating(self) -> tuple[str, ...]:
        """The tasks that could use drafted tokens in the next step. Empty if that step will read prompts."""
        reads = any(unread(slot) > 0 and not slot.generating for slot in self._slots)
        if reads or (self._turns.next() is not None and any(slot.idle for slot in self._slots)):
            return ()
        return tuple(slot.task.id for slot in self._slots if slot.task is not None and slot.generating)

    @property
    def scopes(self) -> frozenset[bytes]:
        """The scopes that have cells."""
        return frozenset(slot.scope for slot in self._slots if slot.length and slot.scope is not None)

    def held(self, slot: int) -> tuple[int, ...]:
        """The tokens whose cells are in a slot."""
        held = self._slots[slot]
        return tuple(held.tokens.all[: held.length])

    # Output

    def plan(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> StepPlan:
        """The next step. Without segments nothing runs, though it may free memory. drafts: guesses of generating tasks' next
        tokens, by task.
        """
        for slot in self._slots:
            self._undraft(slot)
            slot.restored = 0
        for choices in self._groups.values():
            reader = choices.reader
            if reader is not None and reader.slot is not None and reader.slot.length >= choices.length:
                self._release(choices)
        admitted = tuple(self._admit())
        copied = tuple(task_id for task_id in admitted if self._is_copied(self._tasks[task_id]))
        adapter, generating, segments = self._compute()
        if drafts and generating == len(segments):
            self._draft(drafts, segments)
        ordered, after = filled([segments[i] for i in sorted(segments)], adapter, self._slots, self.limits, self.free_cells)
        memory, self._memory = tuple(self._memory), []
        still = tuple(task_id for task_id in copied if self._tasks[task_id].slot is not None)  # not sent back by this same plan
        return StepPlan(memory, ordered, after, admitted, generating, still, adapter)

    def _compute(self) -> tuple[str | None, int, dict[int, Segment]]:
        """The adapter whose turn it is, how many of its tasks generate, and the segments by slot."""
        segments: dict[int, Segment] = {}
        for _ in self._slots:
            able = [slot.task for slot in self._slots if slot.task is not None and unread(slot) > 0]
            adapter = self._adapter_turns.next([Runner(task.adapter, task.fair, task.number) for task in able])
            ours = [slot for slot in self._slots if slot.adapter == adapter]
            for slot in sorted((s for s in ours if s.generating), key=age):
                self._take(slot, 1, segments)
            generating = len(segments)
            self._prefill(ours, generating, segments)
            if segments or not able:  # an adapter's only task may have been sent back for want of cells
                break
        return adapter, generating, segments

    # Admission

    def _admit(self) -> Iterator[str]:
        self._reuse.compared = self._moved = 0
        others = any(slot.generating for slot in self._slots)
        while self._reuse.compared < COMPARED and any(slot.idle for slot in self._slots):
            task = self._turns.next()
            if task is None or (others and self._moved >= MOVED):
                return
            if task.choices is not None and task.choices.must_wait(task):
                self._turns.drop(task.fair, task.id)
                task.choices.waiting.append(task)
                continue
            if not self._place(task):
                return
            self._turns.take(task.fair, task.id, hold=True)
            yield task.id

    def _place(self, task: QueuedTask) -> bool:
        """Gives the task a slot, with its scope's cached tokens. False if there are not enough cells."""
        found = self._reuse.best(task)
        slot, source, saved, common = found.slot, found.source, found.saved, found.common
        # A copy in a split cache takes cells of its own
        shared = 0 if saved is not None or (source is not None and not self.limits.unified) else common
        running = sum(not s.idle for s in self._slots)
        need = len(task.tokens) - shared + 1
        if running and self._available(found) < need + MARGIN * running:
            return False
        if saved is not None:  # before others are added: it might have to go for them
            self._saved.take(saved.number)
        self._retire(slot, found.kept)
        if source is not None:
            self._cells.copy(source.index, slot.index, common)
            self._memory.append(Copy(source.index, slot.index, common))
        elif saved is not None:
            self._restore(slot, task, saved, common)
            need -= common
        slot.tokens, slot.length = task.tokens, common
        slot.task, slot.scope, slot.choices, task.slot = task, task.scope, task.choices, slot
        slot.adapter = task.adapter
        task.number = slot.used = self._tick()
        cached = common
        if task.choices is not None:
            cached = task.choices.cached = common if task.choices.cached is None else task.choices.cached
            if common < task.choices.length:
                task.choices.reader = task
        task.cached = cached if task.cached is None else task.cached
        task.long = len(task.tokens) - common > self.limits.burst
        while self.free_cells < need and self._evict():
            pass
        return True

    def _available(self, found: FoundCells) -> int:
        """The cells that are free once every idle cache is removed, except the one that the task would use."""
        kept = [0 if s.idle and s is not found.source else s.length for s in self._slots]
        kept[found.slot.index] = found.kept
        return self.free_cells + self._cells.freeable(kept)

    # Choices

    def _is_copied(self, task: QueuedTask) -> bool:
        return task.slot is not None and task.slot.length == len(task.tokens)

    def _release(self, choices: Choices[QueuedTask]) -> None:
        """Queues the choices that waited for a prompt, ahead of their caller's later requests."""
        for task in reversed(choices.released()):
            self._turns.add(task.fair, task.id, task, first=True)

    def _leave(self, task: QueuedTask, choices: Choices[QueuedTask]) -> None:
        choices.members -= 1
        if task in choices.waiting:
            choices.waiting.remove(task)
        if choices.reader is task:
            self._release(choices)
        if choices.members:
            return
        self._groups = {name: group for name, group in self._groups.items() if group is not choices}
        for slot in self._slots:
            if slot.choices is choices:
                slot.choices = None
                if slot.scope is None:
                    self._trim(slot, 0)

    # Cells

    def _tick(self) -> int:
        self._count += 1
        return self._count

    def _trim(self, slot: CacheSlot, keep: int) -> None:
        if slot.length > keep:
            self._cells.cut(slot.index, keep)
            slot.length = keep
            self._memory.append(Trim(slot.index, keep))

    def _retire(self, slot: CacheSlot, keep: int) -> None:
        """Cuts an idle cache for another task. If much of it is cut, it is copied out first."""
        if self.limits.saved and slot.scope is not None and slot.length - keep >= MIN_SAVED:
            number, removed = self._saved.add((slot.scope, slot.adapter), slot.tokens, slot.length)
            self._memory += map(Discard, removed)
            if number is not None:
                self._memory.append(Save(slot.index, number, slot.length, slot.scope, slot.adapter))
                self._moved += slot.length
        self._trim(slot, keep)

    def _restore(self, slot: CacheSlot, task: QueuedTask, saved: SavedCache, common: int) -> None:
        """Copies a cache back into an empty slot. The copy stays only if much of it is another text's."""
        self._cells.grow(slot.index, common)
        scope = b"" if task.scope is None else task.scope  # the task's own, not the copy's: it opens for no other
        self._memory.append(Restore(slot.index, saved.number, saved.length, common, task.id, scope, task.adapter))
        self._moved += saved.length
        slot.restored = common
        kept = saved.length - common >= MIN_SAVED
        self._memory += map(Discard, self._saved.put_back(saved) if kept else [saved.number])

    def _undraft(self, slot: CacheSlot) -> None:
        """Removes the cells of drafted tokens that were not confirmed."""
        if slot.drafted:
            slot.drafted = ()
            self._cells.cut(slot.index, slot.length)
            self._memory.append(Trim(slot.index, slot.length))

    def _evict(self) -> bool:
        """Removes the longest-unused idle cache. A prompt that choices may still copy goes last."""
        idle = [slot for slot in self._slots if slot.idle and slot.length]
        if idle:
            self._retire(min(idle, key=lambda slot: (slot.choices is not None, slot.used)), 0)
        return bool(idle)

    def _preempt(self, segments: dict[int, Segment]) -> None:
        """Returns one task to the head of its queue: the youngest of the caller with most cells, within the tenant with most
        cells. Never the oldest task: it must advance.
        """
        running = [(slot, slot.task) for slot in self._slots if slot.task is not None]
        held: Counter[Fair | str] = Counter()
        for slot, task in running:
            held[task.fair[0]] += slot.length
            held[task.fair] += slot.length
        oldest = min(task.number for _, task in running)
        slot, task = max(running, key=lambda pair: weight(pair[1], held, oldest))
        planned = segments.pop(slot.index, None)
        if planned is not None:  # these cells were never filled
            self._cells.cut(slot.index, planned.start)
            slot.length = planned.start
        slot.task = task.slot = slot.choices = None
        self._trim(slot, 0)
        self._turns.add(task.fair, task.id, task, first=True)
        self._turns.release(task.fair)

    def _take(self, slot: CacheSlot, n: int, segments: dict[int, Segment]) -> None:
        """Adds the next `n` tokens of a slot's task to the step, after making room for them."""
        while self.free_cells < n and slot.task is not None:
            if not self._evict():
                self._preempt(segments)
        task = slot.task
        if task is None:
            return
        start = slot.length
        self._cells.grow(slot.index, n)
        slot.length += n
        slot.used = self._tick()
        self._turns.spend(task.fair, n)
        output = slot.length == len(task.tokens)
        segments[slot.index] = Segment(slot.index, start, task.tokens.all[start : start + n].tolist(), task.id, output)

    def _draft(self, drafts: Mapping[str, Sequence[int]], segments: dict[int, Segment]) -> None:
        """Adds drafted tokens to the segments, within the step's limit and the free cells. They count as their callers'."""
        room = min(self.limits.drafts, self.free_cells) if self.limits.cuttable else 0
        for index, segment in segments.items():
            slot = self._slots[index]
            task = slot.task
            if task is None or room <= 0:
                continue
            most = min(room, MAX_DRAFT, self.limits.context - slot.length)
            slot.drafted = tuple(drafts.get(task.id, ())[:most])
            n = len(slot.drafted)
            self._cells.grow(index, n)
            self._turns.spend(task.fair, n)
            segments[index] = replace(segment, tokens=[*segment.tokens, *slot.drafted], drafted=n)
            room -= n

    # Prompts

    def _prefill(self, slots: Sequence[CacheSlot], generating: int, segments: dict[int, Segment]) -> None:
        """slots: of the step's adapter. generating: of them. Tasks of other adapters must not be stalled either."""
        # A task that waits for something other than a step has nothing left to read.
        reading = sorted((s for s in slots if s.index not in segments and unread(s) > 0), key=self._next_to_read)
        others = generating > 0 or any(slot.generating for slot in self._slots)
        short = [slot for slot in reading if slot.task is not None and not slot.task.long]
        long = [slot for slot in reading if slot.task is not None and slot.task.long]
        room = self.limits.burst if others else self.limits.chunk
        left = self._read(short, room, segments)
        if self._pace is not None and slots:
            self.share = self._pace(generating, long[0].length if long else 0, slots[0].adapter)
        # While nothing is generated, a whole chunk stalls no task, but short prompts may come at every step.
        own = self._round(self.share if generating else max(self.share, 1))  # 0: a step at rest, which generates
        share = own if others else max(left, own)
        self._read(long, min(share, self.limits.step - generating - (room - left)), segments)

    def _next_to_read(self, slot: CacheSlot) -> tuple[tuple[int, int], int]:
        """Sort key: first the tenant and caller with the least computed tokens, then age. One caller's long prompts do not
        delay another's.
        """
        return ((0, 0) if slot.task is None else self._turns.spent(slot.task.fair)), age(slot)

    def _round(self, share: int) -> int:
        """Rounds a share: one of its tokens is computed together with the generated ones, the rest in multiples. Small shares,
        behind a long text, stay as they are: attention dominates there, and its cost has no steps.
        """
        multiple = self.limits.multiple
        return share if share <= 2 * multiple else share - (share - 1) % multiple

    def _read(self, slots: Sequence[CacheSlot], room: int, segments: dict[int, Segment]) -> int:
        for slot in slots:
            if room > 0 and slot.task is not None:
                n = min(room, _piece(slot))
                self._take(slot, n, segments)
                room -= n
        return room


def _piece(slot: CacheSlot) -> int:
    """How many of the remaining tokens one step may take."""
    read, left = slot.length, unread(slot)
    if slot.task is None or read + left <= slot.task.tokens.prompt:
        return left
    return slot.task.tokens.prompt - read if read < slot.task.tokens.prompt else min(left, PIECE)
