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
  slots get one filler token: those in gaps, and those next to the running ones if that makes the count round. They are idle, or
  wait for their adapter's turn. The filler is removed after the step. It is added only if it lengthens no task's attention: a
  neighbour's timing must not reveal an idle cache.
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
from lacre_backend.engine.placement import distances
from lacre_backend.engine.plan import Copy, EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.slots import CacheSlot, QueuedTask, age, cost, unread, weight
from lacre_backend.engine.tokens import Tokens
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue

MIN_REUSE: Final = 16  # tokens; computing a shorter common prefix (every chat's first words) is faster than finding it
MIN_COPY: Final = 128  # tokens; below it, copying between slots takes longer than computing. Choices copy any shared prefix
MARGIN: Final = 32  # free cells per running task before another is admitted, so that it is not sent back at once
COMPARED: Final = 64  # prefixes compared per step, about 4 us each; later tasks wait for the next step
PAD: Final = 256  # llama.cpp reads cells in multiples of this many
PIECE: Final = 63  # tokens: from 64 of one sequence on, ggml's flash attention on CPUs computes in tiles
NO_DRAFTS: Final[Mapping[str, Sequence[int]]] = MappingProxyType({})
FILLER: Final = 0  # any token works: its result is ignored


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
        self._compared = 0  # prefixes compared in this step
        self._memory: list[Trim | Copy] = []

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
                self._trim(slot, self._of_choices(slot, task) if keep else 0)
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
        for choices in self._groups.values():
            reader = choices.reader
            if reader is not None and reader.slot is not None and reader.slot.length >= choices.length:
                self._release(choices)
        admitted = tuple(self._admit())
        copied = tuple(task_id for task_id in admitted if self._is_copied(self._tasks[task_id]))
        adapter, generating, segments = self._compute()
        if drafts and generating == len(segments):
            self._draft(drafts, segments)
        ordered, after = self._filled([segments[i] for i in sorted(segments)], adapter)
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
        self._compared = 0
        while self._compared < COMPARED and any(slot.idle for slot in self._slots):
            task = self._turns.next()
            if task is None:
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
        slot, source, common = self._best(task)
        shared = common if source is None or self.limits.unified else 0  # a copy in a split cache takes cells of its own
        running = sum(not s.idle for s in self._slots)
        need = len(task.tokens) - shared + 1
        if running and self._available(slot, source, common) < need + MARGIN * running:
            return False
        self._trim(slot, common if source is None else 0)
        if source is not None:
            self._cells.copy(source.index, slot.index, common)
            self._memory.append(Copy(source.index, slot.index, common))
        slot.tokens, slot.length = task.tokens, common
        slot.task, slot.scope, slot.choices, task.slot = task, task.scope, task.choices, slot
        slot.adapter = task.adapter
        task.number = slot.used = self._tick()
        found = common
        if task.choices is not None:
            found = task.choices.cached = common if task.choices.cached is None else task.choices.cached
            if common < task.choices.length:
                task.choices.reader = task
        task.cached = found if task.cached is None else task.cached
        task.long = unread(slot) > self.limits.burst
        while self.free_cells < need and self._evict():
            pass
        return True

    def _available(self, slot: CacheSlot, source: CacheSlot | None, common: int) -> int:
        """The cells that are free once every idle cache is removed, except the one that the task would use."""
        kept = [0 if s.idle and s is not source else s.length for s in self._slots]
        kept[slot.index] = common if source is None else 0
        return self.free_cells + self._cells.freeable(kept)

    def _best(self, task: QueuedTask) -> tuple[CacheSlot, CacheSlot | None, int]:
        """The slot to use, the slot to copy from (None: use its own cells), and the length of the common prefix."""
        idle = [slot for slot in self._slots if slot.idle]
        common = {slot.index: self._common(slot, task) for slot in self._slots}
        best = max(idle, key=lambda slot: (common[slot.index], slot.used))
        source = max(self._slots, key=lambda slot: common[slot.index])
        sibling = task.choices is not None and source.choices is task.choices  # then none of the prompt is computed again
        least, gain = (1, 0) if sibling else (MIN_REUSE, MIN_COPY)
        if common[best.index] >= max(least, common[source.index] - gain):
            return best, None, common[best.index]
        far = distances([None if slot.idle else slot.adapter == task.adapter for slot in self._slots])
        fresh = min(idle, key=lambda slot: cost(slot, *far[slot.index]))
        if common[source.index] >= max(gain, 1) and source is not fresh:
            return fresh, source, common[source.index]
        return fresh, None, 0

    def _common(self, slot: CacheSlot, task: QueuedTask) -> int:
        """The length of the common prefix. Without a sibling's logits it leaves at least the last token."""
        if (ours := self._of_choices(slot, task)) > 0:
            return ours
        if slot.adapter != task.adapter:  # its cells hold what other weights computed
            return 0
        if task.scope is None or slot.scope != task.scope or not self.limits.cuttable:
            return 0
        limit = min(len(task.tokens) - 1, slot.length)
        self._compared += limit > 0
        return task.tokens.common(slot.tokens, limit)

    # Choices

    def _of_choices(self, slot: CacheSlot, task: QueuedTask) -> int:
        """How many tokens of its request's prompt a slot has for the task. A state that cannot be cut must end exactly
        there.
        """
        choices = task.choices
        if choices is None or slot.choices is not choices:
            return 0
        if not self.limits.cuttable:
            return choices.length if slot.length == choices.length else 0
        return min(slot.length, choices.length)

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
            self._trim(min(idle, key=lambda slot: (slot.choices is not None, slot.used)), 0)
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

    def _filled(self, segments: list[Segment], adapter: str | None) -> tuple[tuple[Segment, ...], tuple[Trim, ...]]:
        """Adds fillers in the gaps and up to a round number; also returns how to remove them. adapter: of the step. A filler is
        as long as the shortest segment: llama.cpp computes sequences of one length together.
        """
        if len(segments) < 2 or not self.limits.cuttable:
            return tuple(segments), ()
        longest = max(segment.start + len(segment.tokens) for segment in segments)
        padded = min(-(-longest // PAD) * PAD, self.limits.context)
        first, last = segments[0].slot, segments[-1].slot
        each = min(len(segment.tokens) for segment in segments)
        usable = [s for s in self._slots if (s.idle or s.adapter != adapter) and s.length + each <= padded]
        inside = [slot for slot in usable if first < slot.index < last and not self.limits.unified]
        outside = self._beside(usable, first, last)
        n = len(segments) + len(inside)
        missing = -n % self.limits.multiple
        if each == 1 and n > self.limits.multiple and 0 < missing <= min(self.limits.multiple // 2, len(outside)):
            inside += outside[:missing]
        if each * len(inside) > min(self.limits.step, self.free_cells) - sum(len(segment.tokens) for segment in segments):
            return tuple(segments), ()
        fillers = [Segment(slot.index, slot.length, (FILLER,) * each, None, True) for slot in inside]
        ordered = sorted([*segments, *fillers], key=lambda segment: segment.slot)
        return tuple(ordered), tuple(Trim(filler.slot, filler.start) for filler in fillers)

    def _beside(self, usable: Sequence[CacheSlot], first: int, last: int) -> list[CacheSlot]:
        """Idle slots that border the running ones; in a unified cache, any."""
        if self.limits.unified:
            return list(usable)
        known = {slot.index: slot for slot in usable}
        after = itertools.takewhile(known.__contains__, range(last + 1, len(self._slots)))
        before = itertools.takewhile(known.__contains__, range(first - 1, -1, -1))
        return [known[index] for index in (*after, *before)]


def _piece(slot: CacheSlot) -> int:
    """How many of the remaining tokens one step may take."""
    read, left = slot.length, unread(slot)
    if slot.task is None or read + left <= slot.task.tokens.prompt:
        return left
    return slot.task.tokens.prompt - read if read < slot.task.tokens.prompt else min(left, PIECE)
