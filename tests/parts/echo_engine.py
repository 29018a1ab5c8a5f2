"""An engine without a model: it answers with the last message it received. For tests of everything around an engine.

Rules:
- It fulfils the whole contract of `protocol.py`: the same contract suite runs against it and llama.cpp.
- Tokens are bytes, so a non-ASCII character has several. Ids from 256 on are control tokens.
- It is deterministic: sampling settings have no effect. It refuses grammars, because it cannot follow them.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final

from lacre.runtime import tasks
from lacre_backend.engine.delivery import TaskEvents
from lacre_backend.engine.protocol import (
    Alternative,
    ControlToken,
    EngineError,
    Event,
    Finish,
    FinishReason,
    Grammar,
    LayerView,
    ModelInfo,
    Task,
    TaskKind,
    TaskRefused,
    Token,
    check,
)
from lacre_backend.engine.text import TextStream

BOS: Final = ControlToken(256, "<|bos|>")
START: Final = ControlToken(257, "<|start|>")
END: Final = ControlToken(258, "<|end|>")
_CONTROL: Final = (BOS, START, END)
UNLIKELY: Final = -20.0  # log-probability of a token that it does not say
LAYERS: Final = 3
N_VOCAB: Final = 256 + len(_CONTROL)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class _Job:
    def __init__(self, task: Task, piece: Callable[[int], bytes]) -> None:
        self.task = task
        self.stream = TaskEvents(asyncio.get_running_loop())
        self.text = TextStream(task.stop)
        self.text.begin(map(piece, task.begun))
        self.completion_tokens = 0
        self.cancelled = False

    def end(self, reason: FinishReason) -> None:
        text = "" if self.text.stopped else self.text.flush()
        if self.text.stopped and reason == "length":
            reason = "stop"
        self.stream.put(Finish(reason, len(self.task.sequence), 0, self.completion_tokens, text, self.text.matched))


class EchoEngine:
    """An `Engine` that echoes. delay: seconds per token. repeat: how many times it repeats the message."""

    def __init__(self, *, name: str = "echo", n_ctx: int = 4096, delay: float = 0.0, repeat: int = 1) -> None:
        self._delay = delay
        self._repeat = repeat
        self._jobs: dict[str, _Job] = {}
        self._running: set[asyncio.Task[object]] = set()
        self._closed = False
        self.model: ModelInfo = ModelInfo(
            name=name,
            digest="sha256:" + hashlib.sha256(b"echo").hexdigest(),
            created=0,
            n_ctx=n_ctx,
            n_vocab=N_VOCAB,
            longest_piece=1,
            chat_template=CHAT_TEMPLATE,
            bos=BOS,
            eos=END,
            add_bos=True,
            control_tokens=_CONTROL,
            kinds=frozenset({TaskKind.GENERATE}),
        )

    @property
    def died(self) -> bool:
        return False

    @property
    def stuck(self) -> bool:
        return False

    @property
    def running(self) -> int:
        """Tasks that are submitted and not finished."""
        return len(self._jobs)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        tokens: list[int] = []
        while text:
            control = next((c for c in _CONTROL if special and text.startswith(c.text)), None)
            tokens += [control.id] if control else text[0].encode()
            text = text[len(control.text) if control else 1 :]
        return tokens

    def speak(self, tokens: Sequence[int]) -> None:
        """Its answers are bytes."""

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        return TextStream(stop).released(map(self._piece, tokens))

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def submit(self, task: Task) -> AsyncIterator[Event]:
        self._check(task)
        job = self._jobs[task.id] = _Job(task, self._piece)
        running = tasks.detach("echo", self._run(job))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return job.stream

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        for task in tasks:
            self._check(task)
        return [self.submit(task) for task in tasks]

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        raise TaskRefused("This engine only echoes.", field="grammar")

    def cancel(self, task_id: str) -> None:
        if job := self._jobs.get(task_id):
            job.cancelled = True

    def close(self) -> None:
        self._closed = True
        for job in self._jobs.values():
            job.cancelled = True

    def _check(self, task: Task) -> None:
        if self._closed:
            raise EngineError("The engine is closed.")
        check(task, self.model)
        self._admit(task)
        if task.id in self._jobs:
            raise TaskRefused("An unfinished task has this id.", field="id")

    def _admit(self, task: Task) -> None:
        if task.sampling.grammar is not None:
            raise TaskRefused("This engine only echoes.", field="grammar")

    async def _run(self, job: _Job) -> None:
        reason = await self._generate(job)
        del self._jobs[job.task.id]
        job.end(reason)
        self._end(reason)

    async def _generate(self, job: _Job) -> FinishReason:
        limit = min(job.task.max_tokens, self.model.n_ctx - len(job.task.sequence))
        if limit == 0 or job.text.stopped:
            return "length"
        begin, delay = time.monotonic(), self._wait(job.task)
        echoed = itertools.islice(self._answer(job.task.prompt), len(job.task.begun), None)
        for token in job.task.given or echoed:
            await asyncio.sleep(delay)
            if job.cancelled:
                return "cancelled"
            if job.task.time_limit is not None and time.monotonic() - begin >= job.task.time_limit:
                return "length"
            job.completion_tokens += 1
            raw = self._piece(token)
            said = next(echoed, None) if job.task.given else token
            chosen, top = (None, ()) if job.task.logprobs is None else _logprobs(token, said, job.task.logprobs)
            layers = _layers(token, said, job.task.lens)
            job.stream.put(Token(token, job.text.push(raw), raw, chosen, top, layers=layers))
            if job.text.stopped:
                return "stop"
            if job.completion_tokens >= limit:
                return "length"
        return "stop"

    def _wait(self, task: Task) -> float:
        """Seconds before each token."""
        return self._delay

    def _end(self, reason: FinishReason) -> None:
        """A task ended."""

    def _piece(self, token: int) -> bytes:
        """A token's own bytes."""
        return bytes([token])

    def _answer(self, prompt: tuple[int, ...]) -> Iterator[int]:
        """The plain tokens of the last complete message; all of them if the prompt has no messages."""
        last = prompt
        if END.id in prompt:
            end = len(prompt) - 1 - prompt[::-1].index(END.id)
            start = max((i for i, token in enumerate(prompt[:end]) if token == START.id), default=-1)
            newline = prompt.index(ord("\n"), start) if ord("\n") in prompt[start:end] else start
            last = prompt[newline + 1 : end]
        plain = [token for token in last if token < 256]
        for _ in range(self._repeat):
            yield from plain


def _layers(token: int, said: int | None, most: int) -> tuple[LayerView, ...]:
    """It has `LAYERS` layers, and says nothing but "?" before the last."""
    kept = range(LAYERS)[-most:] if most else ()
    heard = {layer: said if layer == LAYERS - 1 else ord("?") for layer in kept}
    return tuple(
        LayerView(
            layer, 1 if token == byte else 2, 0.0 if token == byte else UNLIKELY, bytes([token if byte is None else byte])
        )
        for layer, byte in heard.items()
    )


def _logprobs(token: int, said: int | None, k: int) -> tuple[float, tuple[Alternative, ...]]:
    """What it says is certain; every other token is far less likely. said: None at the end of the echo."""
    best = token if said is None else said
    ids = [(best + i) % 256 for i in range(k)]
    return 0.0 if token == said else UNLIKELY, tuple(Alternative(i, bytes([i]), UNLIKELY * rank) for rank, i in enumerate(ids))
