"""The logit lens: what a model would say after each of its layers. It reads given answers, one task at a time.

How: a context of its own reads the prompt and the answer, and keeps each layer's state before each token of the answer. Then
it computes any tokens, and replaces what the last layer makes of them by those states. So llama.cpp's own final norm and output
head read every state, with this model's biases, scales and caps.

Rules:
- Only the decode thread uses it, in pieces between the engine's steps. A piece is no larger than the share of a long prompt, so
  a lens stalls streams no more than that.
- One task has a context at a time: it bounds the memory. Tenants and callers take turns (`turns.py`).
- The state of the last layer must give the logits that the model really had. If it does not, the lens shows something else
  than the model's thoughts, and the task fails.
- A context is wiped and freed with its task: no state outlives it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import llama_cpp as L
import numpy as np

from lacre.errors import LacreError
from lacre_backend.engine.context import FLASH, KV_TYPES, Batch, Compute, Logits, use_adapter
from lacre_backend.engine.delivery import Outbox, TaskStream
from lacre_backend.engine.graph import GraphTensor, Values, Watcher
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import (
    EngineError,
    Event,
    Finish,
    FinishReason,
    LayerView,
    LensUnsupported,
    PromptProgress,
    Task,
    Token,
)
from lacre_backend.engine.sampling import logprob
from lacre_backend.engine.text import TextStream
from lacre_backend.engine.turns import FairQueue

PIECE: Final = 64  # tokens computed at a time, at most: their logits take memory, and a short prompt is about as long
_CELLS: Final = 256  # llama.cpp makes contexts of multiples of this many
_ANY: Final = 0  # any token works: its last state is replaced
# Nats between the log-probabilities of a token, really and from the last layer's state. On CPUs it was 0. A device may round
# batches of other sizes otherwise; another state is nats away.
_SAME: Final = 0.25
_STATE: Final = "l_out-"  # llama.cpp's name of a layer's output, followed by its number


class LensTask:
    """A task from submission to finish. Only the decode thread uses it, except `cancelled`, which any thread may set."""

    def __init__(self, task: Task, stream: TaskStream) -> None:
        """stream: takes its events."""
        self.task = task
        self.stream = stream
        self.text = TextStream(())
        self.told = 0  # tokens of the answer
        self.cancelled = False
        self.deadline: float | None = None

    def interrupted(self, now: float) -> FinishReason | None:
        if self.cancelled or self.stream.abandoned:
            return "cancelled"
        return "length" if self.deadline is not None and now >= self.deadline else None

    def finish(self, reason: FinishReason) -> Finish:
        return Finish(reason, len(self.task.prompt), 0, self.told, self.text.flush())


class Lenses:
    """The tasks with a lens of one engine."""

    def __init__(
        self, model: Model, compute: Compute, adapters: Mapping[str, Any], outbox: Outbox, lock: threading.Condition
    ) -> None:
        """adapters: of the model, by name. outbox: the engine's, which it flushes after each step. lock: guards `tasks`."""
        self._model = model
        self._compute = compute
        self._adapters = adapters
        self._outbox = outbox
        self._lock = lock
        self.tasks: dict[str, LensTask] = {}  # that are not finished
        self._inbox: list[LensTask] = []  # those of `tasks` that the decode thread has not taken yet
        self._waiting: FairQueue[LensTask] = FairQueue()
        self._running: tuple[LensTask, Iterator[int]] | None = None
        self._context: _LensContext | None = None
        self._most = PIECE

    @property
    def busy(self) -> bool:
        return bool(self.tasks)

    def enter(self, tasks: Sequence[LensTask]) -> None:
        """Called by any thread that holds the lock, with unused ids."""
        self.tasks |= {task.task.id: task for task in tasks}
        self._inbox += tasks

    def step(self, most: int) -> None:
        """Computes a piece of at most so many tokens, at least one, for the task whose turn it is."""
        self._most = max(1, min(most, PIECE))
        self._take_up()
        if self._running is None:
            self._begin()
        if self._running is None:
            return
        task, work = self._running
        if (reason := task.interrupted(time.monotonic())) is not None:
            self._end(task, task.finish(reason))
            return
        try:
            spent = next(work, None)
        except EngineError as error:
            self._end(task, error)
            return
        if spent is None:
            self._end(task, task.finish("length"))
        else:
            self._waiting.spend(task.task.fair, spent)

    def give_up(self, error: EngineError | None) -> None:
        """The thread ends. error: None: the engine was closed."""
        self._take_up()
        for task in list(self.tasks.values()):
            self._end(task, task.finish("cancelled") if error is None else error)

    def _begin(self) -> None:
        task = self._waiting.next()
        if task is not None:
            self._waiting.take(task.task.fair, task.task.id, hold=True)
            if task.task.time_limit is not None:
                task.deadline = time.monotonic() + task.task.time_limit
            self._running = task, self._work(task)

    def _take_up(self) -> None:
        """New tasks wait for their turn. A waiting task that was cancelled ends at once; the running one at its next piece."""
        with self._lock:
            new, self._inbox = self._inbox, []
        for task in new:
            self._waiting.add(task.task.fair, task.task.id, task)
        for task in [task for task in self._waiting if task.interrupted(0) is not None]:
            self._end(task, task.finish("cancelled"))

    def _end(self, task: LensTask, event: Finish | EngineError) -> None:
        with self._lock:
            del self.tasks[task.task.id]
        if self._running is None or self._running[0] is not task:
            self._waiting.drop(task.task.fair, task.task.id)
        else:
            self._running = None
            self._waiting.release(task.task.fair)
            if self._context is not None:
                self._context.free()
                self._context = None
        self._post(task, event)

    def _post(self, task: LensTask, event: Event | EngineError) -> None:
        self._outbox.post(task.stream, event)

    def _work(self, task: LensTask) -> Iterator[int]:
        """The task's work; yields after each piece how many tokens it had. Raises EngineError."""
        asked = task.task
        adapter = None if asked.adapter is None else self._adapters[asked.adapter]
        context = self._context = _LensContext(self._model, len(asked.prompt) + len(asked.given), self._compute, adapter)
        yield 0
        read, before = 0, len(asked.prompt) - 1
        while read < before:
            piece = asked.prompt[read : min(read + self._most, before)]
            context.read(piece, read)
            read += len(piece)
            self._post(task, PromptProgress(read, 0))
            yield len(piece)
        said: list[float] = []  # log-probabilities of the answer's tokens, as the model has them
        sequence = (*asked.prompt, *asked.given)
        while len(said) < len(asked.given):
            start = before + len(said)
            piece = sequence[start : min(start + self._most, len(sequence) - 1)]
            rows = context.read_answer(piece, start)
            said += [logprob(self._model, row, asked.given[len(said) + i], 0)[0] for i, row in enumerate(rows)]
            yield len(piece)
        yield from self._look(task, context, said)

    def _look(self, task: LensTask, context: _LensContext, said: Sequence[float]) -> Iterator[int]:
        given = task.task.given
        layers = _spread(context.layers, task.task.lens)
        context.settle()
        wanted = [(place, layer) for place in range(len(given)) for layer in layers]
        views: list[LayerView] = []
        while wanted:
            piece, wanted = wanted[: self._most], wanted[self._most :]
            for (place, layer), row in zip(piece, context.look(piece), strict=True):
                views.append(self._view(layer, given[place], row))
                if layer == layers[-1]:
                    if not abs(views[-1].logprob - said[place]) < _SAME:
                        raise LensUnsupported
                    self._tell(task, given[place], said[place], views)
                    views = []
            yield len(piece)

    def _view(self, layer: int, token: int, row: Logits) -> LayerView:
        return LayerView(
            layer=layer,
            rank=int((row > row[token]).sum()) + 1,
            logprob=logprob(self._model, row, token, 0)[0],
            says=self._model.piece(int(row.argmax())),
        )

    def _tell(self, task: LensTask, token: int, said: float, views: Sequence[LayerView]) -> None:
        raw = self._model.piece(token)
        task.told += 1
        self._post(task, Token(token, task.text.push(raw), raw, said, layers=tuple(views)))


def _spread(layers: Sequence[int], most: int) -> list[int]:
    """At most so many of the layers, evenly spread, with the last one. layers: ascending."""
    places = np.linspace(len(layers) - 1, 0, min(most, len(layers))).round().astype(int)
    return sorted({layers[place] for place in places})


class _LensContext:
    """A context whose layers are read and replaced. Raises EngineError if there is too little memory, or `LensUnsupported`."""

    def __init__(self, model: Model, tokens: int, compute: Compute, adapter: Any | None) -> None:
        try:
            self._watcher = Watcher(self._wanted, self._got)
        except LacreError as error:
            raise LensUnsupported from error
        params = L.llama_context_default_params()
        params.n_ctx = -(-max(tokens, PIECE) // _CELLS) * _CELLS
        params.n_batch = params.n_ubatch = params.n_outputs_max = PIECE
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = compute.threads
        params.flash_attn_type = FLASH[compute.flash]
        params.type_k = params.type_v = KV_TYPES[compute.kv_type]
        params.no_perf = True
        params.cb_eval = self._watcher.callback
        self._model = model
        self._pointer: Any = L.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise EngineError("There is too little memory for a lens. Try again, or with a shorter prompt.")
        self._memory = L.llama_get_memory(self._pointer)
        self._batch = Batch(PIECE)
        self._keeps = False
        self._states: dict[int, list[Values]] = {}  # by layer: the pieces of the answer
        self._put: Values | None = None  # what replaces the last layer's output in this step
        self._written = False
        use_adapter(self._pointer, adapter)

    @property
    def layers(self) -> list[int]:
        """Ascending. Raises LensUnsupported if llama.cpp names none."""
        if not self._states:
            raise LensUnsupported
        return sorted(self._states)

    def read(self, tokens: Sequence[int], start: int) -> None:
        """The next tokens of the prompt."""
        self._decode(tokens, start, outputs=False)

    def read_answer(self, tokens: Sequence[int], start: int) -> Logits:
        """The next tokens whose states count: the prompt's last one, and the answer's but the last. A row after each."""
        self._keeps = True
        rows = self._decode(tokens, start, outputs=True)
        self._keeps = False
        return rows

    def look(self, places: Sequence[tuple[int, int]]) -> Logits:
        """What the output head makes of these states, a row each. places: tokens of the answer, and layers."""
        self._put = np.stack([self._states[layer][0][place] for place, layer in places])
        self._written = False
        rows = self._decode([_ANY] * len(places), 0, outputs=True)
        self._put = None
        L.llama_memory_clear(self._memory, False)
        if not self._written:
            raise LensUnsupported
        return rows

    def settle(self) -> None:
        """The answer is read: joins the pieces of its states, and empties the cache."""
        self._states = {layer: [np.concatenate(pieces)] for layer, pieces in self._states.items()}
        L.llama_memory_clear(self._memory, False)

    def free(self) -> None:
        L.llama_memory_clear(self._memory, True)
        L.llama_free(self._pointer)

    def _decode(self, tokens: Sequence[int], start: int, *, outputs: bool) -> Logits:
        n, batch = len(tokens), self._batch
        batch.token[:n], batch.pos[:n], batch.sequence[:n] = tokens, range(start, start + n), 0
        batch.output[:n] = outputs
        batch.struct.n_tokens = n
        code = L.llama_decode(self._pointer, batch.struct)
        if self._watcher.error is not None:
            raise LensUnsupported from self._watcher.error
        if code != 0:
            raise EngineError(f"llama.cpp could not read the layers (code {code}). Try again, or with a shorter prompt.")
        if not outputs:
            return np.empty((0, self._model.n_vocab), np.float32)
        return np.ctypeslib.as_array(L.llama_get_logits(self._pointer), (n, self._model.n_vocab))

    def _wanted(self, tensor: GraphTensor) -> bool:
        if not self._keeps and self._put is None:
            return False
        number = _number(tensor)
        return number is not None and (self._keeps or number == self.layers[-1])

    def _got(self, tensor: GraphTensor) -> None:
        number = _number(tensor)
        if number is None:
            return
        if self._put is not None:
            self._written = tensor.overwrite(self._put)
        elif self._keeps:
            self._states.setdefault(number, []).append(tensor.rows())


def _number(tensor: GraphTensor) -> int | None:
    """The layer whose output this is."""
    name = tensor.name
    number = name.removeprefix(_STATE)
    return int(number) if name.startswith(_STATE) and number.isdecimal() else None
