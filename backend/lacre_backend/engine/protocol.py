"""What an engine is: tasks in, tokens out. The API and every engine meet in this file and nowhere else.

Rules
- Nothing here knows of HTTP, JSON or llama.cpp.
- A task is complete in itself: sampling, limits, stop strings, cache scope and whose turn it takes. Engines keep nothing else
  about a request.
- For each task the stream is `PromptProgress`*, `Token`* (or one `Embedding`) and then exactly one `Finish`. Every sampled
  token is one `Token`, also those whose text is still held back, so that `Finish.completion_tokens` is their number. The
  end-of-generation token itself is neither.
- The whole text is the `text` of every token and then that of the finish.
- A task may go on with an answer that another engine began: `begun` are that answer's tokens. What they let out as text is not
  said again; what they held back, the grammar and the penalties are as if they had been sampled here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, Protocol

from lacre.errors import LacreError, UsageError
from lacre_backend.engine.turns import NOBODY, Fair

DIED: Final = "The engine has died, and its process ends: the log has the traceback. Send the request again."
FAILED_STEPS: Final = 8  # in a row, after which an engine counts as broken: a device that fell off its bus fails each one
STUCK: Final = 300.0  # seconds of one step, after which an engine counts as stuck; the longest that is foreseen takes some 60

FinishReason = Literal["stop", "length", "cancelled"]


class EngineError(LacreError):
    """The engine failed while it worked; the request may be tried again. Never holds prompt or answer."""


class EngineClosed(EngineError):
    """The engine was closed: its worker shuts down, and another one may serve the request."""


class GrammarTooCostly(EngineError):
    """The masks of a request's grammar took more than it may spend, or reached a limit: to try again would not help."""


class TaskRefused(UsageError):
    """The engine does not take this task. `field` names the part at fault, as the task calls it; nothing was run."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class GrammarTooLarge(TaskRefused):
    """The grammar is not valid, or larger than an engine follows."""

    def __init__(self) -> None:
        super().__init__("The grammar is not valid, or too large to be enforced. Simplify the schema.", field="grammar")


class PromptTooLong(TaskRefused):
    """The prompt does not fit the context, or leaves no room in it for even one token of an answer."""

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        super().__init__(f"The prompt has {n_prompt} tokens, the context holds {n_ctx}. Shorten the prompt.", field="prompt")
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class TextRefused(UsageError):
    """A text that the model's tokenizer cannot read within its limits of time, memory and stack. Nothing was run."""

    def __init__(self) -> None:
        super().__init__(
            "The model's tokenizer cannot read this text: it takes more time or memory than a text may. "
            "Break up very long runs without spaces, or of spaces, or shorten the text."
        )


class TaskKind(StrEnum):
    """What a task asks for."""

    GENERATE = "generate"
    EMBED = "embed"


class Grammar(Protocol):
    """A grammar as an engine compiled it, for one request; its choices share what its masks may cost."""

    @property
    def begun(self) -> tuple[int, ...]:
        """The tokens of the answer that it has read."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the defaults are OpenAI's. Temperature 0 is greedy. Terms are llama.cpp's.

    seed: None draws a fresh one. grammar: what the engine's `grammar` made, or its source, which `submit` then compiles; every
    answer matches it, or a prefix of it when the token limit cuts it. Penalties count generated tokens only, as OpenAI's do.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    grammar: Grammar | str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One sequence to run. `id` is unique among the tasks that an engine has not finished.

    begun: the tokens of the answer that are there already; read like the prompt, and in no count of generated tokens.
    max_tokens: further ones; 0 where the answer that was begun lacks but its end.
    logprobs: None for none; k for the k most likely alternatives beside the chosen token's own.
    cache_scope: tasks may share a cached prefix only within one scope; None shares nothing. It decides nothing else.
    fair: the pseudonyms of tenant and caller, which alone decide whose turn it is.
    time_limit: seconds of work, counted from the first step (waiting is not counted); then it finishes as "length".
    group: of the choices of one request, whose prompts are the same. It is read once; give them to `submit_all`.
    """

    id: str
    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    kind: TaskKind = TaskKind.GENERATE
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = field(default=(), repr=False)
    logprobs: int | None = None
    cache_scope: bytes | None = field(default=None, repr=False)
    fair: Fair = NOBODY
    time_limit: float | None = None
    begun: tuple[int, ...] = field(default=(), repr=False)
    group: str | None = None

    @property
    def sequence(self) -> tuple[int, ...]:
        """What is read before the first token is sampled."""
        return self.prompt + self.begun


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come. raw: its own bytes, which need not be whole UTF-8. logprob: natural, before sampling."""

    id: int = field(repr=False)
    raw: bytes = field(repr=False)
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token.

    text: what this token lets out: whole code points, never the beginning of a stop string; often "".
    raw: the token's own bytes. logprob, top: set when the task asked. cached_tokens: prompt tokens taken from the cache.
    """

    id: int = field(repr=False)
    text: str = field(repr=False)
    raw: bytes = field(repr=False)
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to a task of kind `EMBED`."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a task. text: what had been held back and turned out to be no stop string. prompt_tokens: with those that
    were begun.
    """

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    text: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """A prompt that takes several steps, now and then before the last: so many of its tokens are there. cached_tokens: of
    these, those taken from the cache.
    """

    prompt_tokens: int
    cached_tokens: int


Event = PromptProgress | Token | Embedding | Finish


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that steers the model and must never come out of a user's text. text: how templates write it.

    lstrip, rstrip: the tokenizer swallows white space before or after it.
    """

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is true of a loaded model. digest: "sha256:" and the hex digest of the file. created: Unix time of the file.

    longest_piece: bytes of the longest token, so that a text longer than `n_ctx * longest_piece` cannot fit. n_embd: numbers in
    an embedding. frame: what the tokenizer puts before and after a text that is to be embedded. control_ids: of
    `control_tokens`, whatever is given for it.
    """

    name: str
    digest: str
    created: int
    n_ctx: int
    n_vocab: int
    longest_piece: int
    chat_template: str | None
    bos: ControlToken | None
    eos: ControlToken | None
    add_bos: bool
    control_tokens: tuple[ControlToken, ...]
    kinds: frozenset[TaskKind]
    n_embd: int = 0
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    control_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        # Made once, and not for each of a request's thousands of texts: a vocabulary may have thousands of them.
        object.__setattr__(self, "control_ids", frozenset(token.id for token in self.control_tokens))


def check(task: Task, model: ModelInfo) -> None:
    """What no engine can run. Raises `TaskRefused` or `PromptTooLong`."""
    if task.kind not in model.kinds:
        raise TaskRefused(f"This model does not {task.kind}.", field="kind")
    if task.max_tokens < (0 if task.begun else 1):
        raise TaskRefused("max_tokens must be at least 1.", field="max_tokens")
    if not task.prompt:
        raise TaskRefused("The prompt is empty.", field="prompt")
    if len(task.prompt) + (task.kind is TaskKind.GENERATE) > model.n_ctx or len(task.sequence) > model.n_ctx:
        raise PromptTooLong(len(task.sequence), model.n_ctx)
    if min(task.prompt) < 0 or max(task.prompt) >= model.n_vocab:
        raise TaskRefused("The prompt names a token that the model does not have.", field="prompt")
    if not all(0 <= token < model.n_vocab and token not in model.control_ids for token in task.begun):
        raise TaskRefused("The answer that was begun names a token that no answer has.", field="begun")
    if not all(0 <= token < model.n_vocab for token in task.sampling.logit_bias):
        raise TaskRefused("The logit bias names a token that the model does not have.", field="logit_bias")


class EngineHealth:
    """What tells a broken engine from a busy one. Written by the engine's thread, read by any."""

    __slots__ = ("_began", "_failures")

    def __init__(self) -> None:
        self._began: float | None = None
        self._failures = 0

    def step(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def rest(self) -> None:
        """The thread waits for work, or is between two steps."""
        self._began = None

    def done(self) -> None:
        """A step was computed."""
        self._failures = 0

    def failed(self, error: EngineError) -> None:
        """A step was not. Raises RuntimeError where too many were not: nothing will do but a new process."""
        self._failures += 1
        if self._failures >= FAILED_STEPS:
            raise RuntimeError("every step fails") from error

    @property
    def stuck(self) -> bool:
        began = self._began
        return began is not None and time.monotonic() - began > STUCK


class Engine(Protocol):
    """Runs tasks on one model. All but `grammar` and `close` return at once; every method may be called from any thread."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def died(self) -> bool:
        """Whether it ended by itself: it runs nothing any more, and its process must end."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether a step has taken so long that it will hardly end."""
        ...

    def submit(self, task: Task) -> AsyncIterator[Event]:
        """Queue a task; called inside a running event loop, which is the one that iterates the result.

        Raises `TaskRefused` (or `PromptTooLong`) at once; the iterator raises `EngineError` if the engine fails, and
        `GrammarTooCostly` if the task's own grammar does. Whoever stops
        iterating before the `Finish` calls `cancel`.
        """
        ...

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        """Queue the choices of one request together: all of them, or none. Raises as `submit`."""
        ...

    def cancel(self, task_id: str) -> None:
        """End a task within one step, with `Finish("cancelled")`; an unknown or finished one is not an error."""
        ...

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text of the program's own, such as a literal of a template: it blocks.

        special: whether control tokens' literals become control tokens.
        """
        ...

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each of a user's texts, in which no control token is recognised.

        Raises `TextRefused` for one that takes more than a text may, and `EngineError`. Neither blocks the event loop nor
        waits for what runs on the model.
        """
        ...

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        """Compile a grammar in llguidance's form of Lark, after what is begun of an answer. It may take some tenths of a
        second: call it beside the event loop. Raises `TaskRefused`; `GrammarTooLarge` where the grammar itself is at fault.
        """
        ...

    def close(self) -> None:
        """End every task as cancelled and free the model. Waits for the step under way."""
        ...
