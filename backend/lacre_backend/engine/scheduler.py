"""Which tokens of which tasks go into the next step: a state machine. Tasks in, a plan out, results back in.

Rules
- Pure: no I/O, no clock, no thread, no llama.cpp. Whoever drives it executes each plan whole, then reports, then asks again.
- A running task's next token goes into every step; prompts take what a step has left, within a bounded share, so that a long
  prompt never stalls the others, and short prompts do not wait behind it.
- Never more cells than there are. Where running tasks outgrow them, idle caches go first. Then a task goes back to its queue
  with what it has generated, to be computed again: the youngest of the tenant that holds the most cells. The oldest task of all
  always advances.
- The pseudonyms of tenant and caller decide whose turn it is, and nothing else does (`turns.py`): who is admitted, whose prompt
  is read first, and who goes back to the queue.
- The scope decides what is reused, and nothing else. Cells are reused within one scope only, and between the choices of one
  request, which read their prompt once (`choices.py`). What has no scope is removed when its request ends.
- What a step costs depends on the number of slots and of the step's tokens, never on how long the contexts are: cells are
  counts (`cells.py`), tokens are never copied as a whole, and their beginnings are compared by digests (`tokens.py`).
- Of an answer that is read again, begun elsewhere or sent back to its queue, at most `PIECE` tokens go into a step, and none
  beside its prompt's: llama.cpp attends to longer texts by another kernel, whose other roundings the quantized layers carry
  on to whole logits (measured: up to 1.6 apart). So read, a text goes on as it would have if nothing had been cut.
- Tokens stand in a plan by ascending slot. With a split cache llama.cpp computes neighbouring sequences together and begins
  anew at every gap (measured: 8 of 16 slots with gaps take 35 ms a step, without 13); and its kernels for CPUs take rows by
  fours, with single ones much dearer (7 sequences take 30 ms, 8 take 24). So idle slots in gaps, and beside the running ones
  where that makes the number round, get one filler token, taken out again after the step. One is given only where it does not
  lengthen anyone's attention: nothing about an idle cache may show in a neighbour's timing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from lacre.errors import UsageError
from lacre_backend.engine.cells import Cells
from lacre_backend.engine.choices import Choices
from lacre_backend.engine.plan import Copy, EngineLimits, Segment, StepPlan, Trim
from lacre_backend.engine.tokens import NO_TOKENS, Tokens
from lacre_backend.engine.turns import NOBODY, Fair, FairQueue

MIN_REUSE: Final = 16  # tokens; shorter common beginnings (every chat's first words) are computed faster than they are sought
MIN_COPY: Final = 128  # tokens; below it a copy between slots takes longer than computing. Choices copy whatever they share
MARGIN: Final = 32  # free cells for each running task before another is admitted, so that it is not sent back at once
COMPARED: Final = 64  # beginnings in one step, some 4 us each; the tasks behind them are admitted with the next step
PAD: Final = 256  # llama.cpp looks at cells in multiples of this many
PIECE: Final = 63  # tokens: from 64 of one sequence on, ggml's flash attention on CPUs computes in tiles
FILLER: Final = 0  # any token does: its result is not looked at


class _Task:
    __slots__ = ("cached", "choices", "fair", "generated", "id", "number", "scope", "slot", "tokens")

    def __init__(self, task_id: str, tokens: Tokens, scope: bytes | None, fair: Fair, choices: Choices[_Task] | None) -> None:
        self.id = task_id
        self.tokens = tokens
        self.scope = scope
        self.fair = fair
        self.choices = choices  # of its request, where there are several
        self.generated = 0
        self.cached: int | None = None  # tokens found in the cache at the first admission
        self.slot: _Slot | None = None
        self.number = 0  # of the admission: the order of age among the running


class _Slot:
    __slots__ = ("choices", "index", "length", "scope", "task", "tokens", "used")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens = NO_TOKENS  # of the task that runs here, or ran here last
        self.length = 0  # of these, how many have their cells here
        self.scope: bytes | None = None
        self.choices: Choices[_Task] | None = None  # whose prompt its cells begin with, while one of them did not end
        self.task: _Task | None = None
        self.used = 0  # when it was last in use, by the scheduler's count

    @property
    def idle(self) -> bool:
        return self.task is None

    @property
    def generating(self) -> bool:
        task = self.task
        return task is not None and task.generated > 0 and len(task.tokens) - self.length == 1


class Scheduler:
    """The state machine. A task is known from `submit` to `end`."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.share = limits.share
        self._slots = [_Slot(i) for i in range(limits.slots)]
        self._tasks: dict[str, _Task] = {}
        self._turns: FairQueue[_Task] = FairQueue()
        self._groups: dict[str, Choices[_Task]] = {}
        self._cells = Cells(limits.slots, limits.cells, unified=limits.unified)
        self._count = 0
        self._compared = 0  # beginnings, in this step
        self._memory: list[Trim | Copy] = []

    # Tasks in

    def submit(
        self,
        task_id: str,
        prompt: Sequence[int] | Tokens,
        scope: bytes | None,
        begun: Sequence[int] = (),
        fair: Fair = NOBODY,
        *,
        group: str | None = None,
    ) -> None:
        """A prompt that fits the context, with what is begun of its answer, and an id that is not in use.

        fair: whose turn it takes. group: of the choices of one request, whose tokens are the same. `Tokens` that the caller's
        thread made save this one the work.
        """
        tokens = prompt if isinstance(prompt, Tokens) else Tokens(prompt, begun)
        if task_id in self._tasks or not 0 < len(tokens) < self.limits.context:
            raise UsageError("The task is known already, or its prompt does not fit.")
        choices = None if group is None else self._groups.setdefault(group, Choices(len(tokens)))
        if choices is not None:
            choices.members += 1
        task = self._tasks[task_id] = _Task(task_id, tokens, scope, fair, choices)
        self._turns.add(fair, task_id, task)

    def end(self, task_id: str, *, keep: bool = True) -> None:
        """The task is over, for whatever reason. keep: what is computed may serve its scope."""
        task = self._tasks.pop(task_id)
        if task.slot is not None:
            self._turns.release(task.fair)
            slot, task.slot = task.slot, None
            slot.task = None
            slot.used = self._tick()
            if not keep or task.scope is None:
                self._trim(slot, self._of_choices(slot, task) if keep else 0)
        elif task.choices is None or task not in task.choices.waiting:
            self._turns.drop(task.fair, task_id)
        if task.choices is not None:
            self._leave(task, task.choices)

    def advance(self, task_id: str, token: int) -> None:
        """The task's segment gave this token, and the task goes on."""
        task = self._tasks[task_id]
        task.tokens.append(token)
        task.generated += 1

    def forget(self, scope: bytes) -> None:
        """Remove what is cached for a scope; what runs goes on."""
        for slot in self._slots:
            if slot.idle and slot.scope == scope:
                self._trim(slot, 0)

    # What is known

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
    def scopes(self) -> frozenset[bytes]:
        """That have cells."""
        return frozenset(slot.scope for slot in self._slots if slot.length and slot.scope is not None)

    def held(self, slot: int) -> tuple[int, ...]:
        """The tokens whose cells are in a slot."""
        held = self._slots[slot]
        return tuple(held.tokens.all[: held.length])

    # A plan out

    def plan(self) -> StepPlan:
        """The next step. Empty segments: nothing runs, though there may be memory to free."""
        for choices in self._groups.values():
            reader = choices.reader
            if reader is not None and reader.slot is not None and reader.slot.length >= choices.length:
                self._release(choices)
        admitted = tuple(self._admit())
        copied = tuple(task_id for task_id in admitted if self._is_copied(self._tasks[task_id]))
        segments: dict[int, Segment] = {}
        for slot in sorted((s for s in self._slots if s.generating), key=_age):
            self._take(slot, 1, segments)
        generating = len(segments)
        self._prefill(generating, segments)
        ordered, after = self._filled([segments[i] for i in sorted(segments)])
        memory, self._memory = tuple(self._memory), []
        still = tuple(task_id for task_id in copied if self._tasks[task_id].slot is not None)  # not sent back by this very plan
        return StepPlan(memory, ordered, after, admitted, generating, still)

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

    def _place(self, task: _Task) -> bool:
        """Give the task a slot, with what its scope has cached; False where the cells do not suffice."""
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
        task.number = slot.used = self._tick()
        found = common
        if task.choices is not None:
            found = task.choices.cached = common if task.choices.cached is None else task.choices.cached
            if common < task.choices.length:
                task.choices.reader = task
        task.cached = found if task.cached is None else task.cached
        while self.free_cells < need and self._evict():
            pass
        return True

    def _available(self, slot: _Slot, source: _Slot | None, common: int) -> int:
        """Cells that are free once every idle cache is gone, but for what the task would use."""
        kept = [0 if s.idle and s is not source else s.length for s in self._slots]
        kept[slot.index] = common if source is None else 0
        return self.free_cells + self._cells.freeable(kept)

    def _best(self, task: _Task) -> tuple[_Slot, _Slot | None, int]:
        """The slot to use, the one to copy from first (None: use what is there), and how many tokens are common."""
        idle = [slot for slot in self._slots if slot.idle]
        common = {slot.index: self._common(slot, task) for slot in self._slots}
        best = max(idle, key=lambda slot: (common[slot.index], slot.used))
        source = max(self._slots, key=lambda slot: common[slot.index])
        sibling = task.choices is not None and source.choices is task.choices  # then nothing of the prompt is computed again
        least, gain = (1, 0) if sibling else (MIN_REUSE, MIN_COPY)
        if common[best.index] >= max(least, common[source.index] - gain):
            return best, None, common[best.index]
        busy = [slot.index for slot in self._slots if not slot.idle]
        fresh = min(idle, key=lambda slot: _cost(slot, busy))
        if common[source.index] >= max(gain, 1) and source is not fresh:
            return fresh, source, common[source.index]
        return fresh, None, 0

    def _common(self, slot: _Slot, task: _Task) -> int:
        """The length of the common beginning. Where no sibling's logits are at hand, all but the last token at most."""
        if (ours := self._of_choices(slot, task)) > 0:
            return ours
        if task.scope is None or slot.scope != task.scope or not self.limits.cuttable:
            return 0
        limit = min(len(task.tokens) - 1, slot.length)
        self._compared += limit > 0
        return task.tokens.common(slot.tokens, limit)

    # Choices

    def _of_choices(self, slot: _Slot, task: _Task) -> int:
        """How many tokens of its request's prompt a task finds in a slot. What cannot be cut is found at its very end only."""
        choices = task.choices
        if choices is None or slot.choices is not choices:
            return 0
        if not self.limits.cuttable:
            return choices.length if slot.length == choices.length else 0
        return min(slot.length, choices.length)

    def _is_copied(self, task: _Task) -> bool:
        return task.slot is not None and task.slot.length == len(task.tokens)

    def _release(self, choices: Choices[_Task]) -> None:
        """Those that waited for a prompt take their turns, before what their caller asked for later."""
        for task in reversed(choices.released()):
            self._turns.add(task.fair, task.id, task, first=True)

    def _leave(self, task: _Task, choices: Choices[_Task]) -> None:
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

    def _trim(self, slot: _Slot, keep: int) -> None:
        if slot.length > keep:
            self._cells.cut(slot.index, keep)
            slot.length = keep
            self._memory.append(Trim(slot.index, keep))

    def _evict(self) -> bool:
        """Remove the idle cache unused for the longest; a prompt that choices may still copy goes last."""
        idle = [slot for slot in self._slots if slot.idle and slot.length]
        if idle:
            self._trim(min(idle, key=lambda slot: (slot.choices is not None, slot.used)), 0)
        return bool(idle)

    def _preempt(self, segments: dict[int, Segment]) -> None:
        """One task back to the head of its queue: of the tenant that holds the most cells, and there of the caller that does,
        the youngest. Never the oldest of all: it must advance.
        """
        running = [(slot, slot.task) for slot in self._slots if slot.task is not None]
        held: Counter[Fair | str] = Counter()
        for slot, task in running:
            held[task.fair[0]] += slot.length
            held[task.fair] += slot.length
        oldest = min(task.number for _, task in running)
        slot, task = max(running, key=lambda pair: _weight(pair[1], held, oldest))
        planned = segments.pop(slot.index, None)
        if planned is not None:  # these cells were never filled
            self._cells.cut(slot.index, planned.start)
            slot.length = planned.start
        slot.task = task.slot = slot.choices = None
        self._trim(slot, 0)
        self._turns.add(task.fair, task.id, task, first=True)
        self._turns.release(task.fair)

    def _take(self, slot: _Slot, n: int, segments: dict[int, Segment]) -> None:
        """The next `n` tokens of a slot's task into the step; room for them is made."""
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

    # Prompts

    def _prefill(self, generating: int, segments: dict[int, Segment]) -> None:
        # What waits for something else than a step has nothing left to read.
        reading = sorted((s for s in self._slots if s.index not in segments and _left(s) > 0), key=self._next_to_read)
        short = [slot for slot in reading if _left(slot) <= self.limits.burst]
        long = [slot for slot in reading if _left(slot) > self.limits.burst]
        room = self.limits.burst if generating else self.limits.chunk
        left = self._read(short, room, segments)
        # While nothing is generated, nobody is stalled by a whole chunk; but then short prompts may come at every step.
        own = self._round(self.share)
        share = own if generating else max(left, own)
        self._read(long, min(share, self.limits.step - generating - (room - left)), segments)

    def _next_to_read(self, slot: _Slot) -> tuple[tuple[int, int], int]:
        """The oldest of the tenant and caller for whom the least was computed: one's long prompts do not hold up another's."""
        return ((0, 0) if slot.task is None else self._turns.spent(slot.task.fair)), _age(slot)

    def _round(self, share: int) -> int:
        """One of a share's tokens is computed with those that are generated, the rest by itself: a round number. Behind a long
        text, where shares are small, attention takes the time, and its cost has no steps.
        """
        multiple = self.limits.multiple
        return share if share <= 2 * multiple else share - (share - 1) % multiple

    def _read(self, slots: Sequence[_Slot], room: int, segments: dict[int, Segment]) -> int:
        for slot in slots:
            if room > 0 and slot.task is not None:
                n = min(room, _piece(slot))
                self._take(slot, n, segments)
                room -= n
        return room

    def _filled(self, segments: list[Segment]) -> tuple[tuple[Segment, ...], tuple[Trim, ...]]:
        """With fillers in the gaps and up to a round number, and how to take them out again."""
        if len(segments) < 2 or not self.limits.cuttable:
            return tuple(segments), ()
        longest = max(segment.start + len(segment.tokens) for segment in segments)
        padded = min(-(-longest // PAD) * PAD, self.limits.context)
        first, last = segments[0].slot, segments[-1].slot
        usable = [slot for slot in self._slots if slot.idle and slot.length < padded]
        inside = [slot for slot in usable if first < slot.index < last and not self.limits.unified]
        outside = self._beside(usable, first, last)
        n = len(segments) + len(inside)
        missing = -n % self.limits.multiple
        if n > self.limits.multiple and 0 < missing <= min(self.limits.multiple // 2, len(outside)):
            inside += outside[:missing]
        if len(inside) > min(self.limits.step, self.free_cells) - sum(len(segment.tokens) for segment in segments):
            return tuple(segments), ()
        fillers = [Segment(slot.index, slot.length, (FILLER,), None, True) for slot in inside]
        ordered = sorted([*segments, *fillers], key=lambda segment: segment.slot)
        return tuple(ordered), tuple(Trim(filler.slot, filler.start) for filler in fillers)

    def _beside(self, usable: Sequence[_Slot], first: int, last: int) -> list[_Slot]:
        """Idle slots without a gap to the running ones; in a unified cache, any."""
        if self.limits.unified:
            return list(usable)
        known = {slot.index: slot for slot in usable}
        after = itertools.takewhile(known.__contains__, range(last + 1, len(self._slots)))
        before = itertools.takewhile(known.__contains__, range(first - 1, -1, -1))
        return [known[index] for index in (*after, *before)]


def _age(slot: _Slot) -> int:
    return slot.task.number if slot.task is not None else 0


def _cost(slot: _Slot, busy: Sequence[int]) -> tuple[bool, int, bool, int, int]:
    """Which idle slot to give away: first one without a prompt that choices may still copy. Then one inside or beside those
    that run, even if a cache elsewhere is older, because every gap is computed or begins a new computation; of several, an
    empty one, else the one unused for the longest.
    """
    kept = slot.choices is not None and slot.length > 0
    inside = bool(busy) and busy[0] < slot.index < busy[-1]
    distance = 0 if not busy or inside else min(abs(slot.index - busy[0]), abs(slot.index - busy[-1]))
    return kept, distance, bool(slot.length), slot.used if slot.length else 0, slot.index


def _weight(task: _Task, held: Counter[Fair | str], oldest: int) -> tuple[bool, int, int, int]:
    """The greatest goes back to its queue. held: cells, of tenants and of callers."""
    return task.number != oldest, held[task.fair[0]], held[task.fair], task.number


def _left(slot: _Slot) -> int:
    """Tokens of the slot's task that are not computed."""
    return 0 if slot.task is None else len(slot.task.tokens) - slot.length


def _piece(slot: _Slot) -> int:
    """Of the tokens that are left, as many as one step may take."""
    read, left = slot.length, _left(slot)
    if slot.task is None or read + left <= slot.task.tokens.prompt:
        return left
    return slot.task.tokens.prompt - read if read < slot.task.tokens.prompt else min(left, PIECE)
