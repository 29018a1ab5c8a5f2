"""The engine interface: tasks in, tokens out. The API and the engines share this file and nothing else.

Rules:
- Nothing here depends on HTTP, JSON or llama.cpp.
- A task is complete in itself: sampling, limits, stop strings, cache scope and fairness. Engines store nothing else about a
  request.
- Each task's stream is `PromptProgress`*, `Token`* (or one `Embedding`) and then exactly one `Finish`. Every sampled
  token is one `Token`, even if its text is still held back, so `Finish.completion_tokens` is their number. The
  end-of-generation token is
  not in the stream.
- The whole text is every token's `text`, followed by the `text` of the finish.
- A task may score a `given` answer: its tokens are computed one by one as if they had been sampled, and none is sampled. With
  `lens`, each of these tokens also has what the model would have said after each layer.
- A task may continue an answer that another engine began: `begun` are its tokens. Text that they already released is not sent
  again. Held-back text, grammar and penalties continue as if the tokens had been sampled here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, Protocol

from lacre.errors import AppLost, LacreError, UsageError
from lacre_backend.engine.turns import NOBODY, Fair

DIED: Final = "The engine has died, and its process ends: the log has the traceback. Send the request again."

FinishReason = Literal["stop", "length", "cancelled"]

NO_FORCING: Final = '%llguidance {"no_forcing": true}\n'  # begins a grammar in llguidance's form of Lark


class EngineError(LacreError):
    """The engine failed while it worked. The caller may send the request again. The text never contains prompt or answer."""


class EngineClosed(EngineError):
    """The engine was closed because its worker shuts down. Another worker may serve the request."""


class EngineLost(AppLost):
    """The engine's own process has ended, with this work. It is started again. begun: whether the work may have ended it."""

    def __init__(self, *, begun: bool) -> None:
        did = "ended while it computed this request" if begun else "has ended, and is being started again"
        super().__init__(f"The engine's process {did}. Send the request again: another worker may have it.", begun=begun)


class LensUnsupported(EngineError):
    """llama.cpp shows no state of this model's layers that its own output head could read. Sending it again does not help."""

    def __init__(self) -> None:
        super().__init__("The layers of this model's architecture cannot be read through its output. Ask without a lens.")


class GrammarTooCostly(EngineError):
    """The masks of the request's grammar exceeded a cost limit. Sending it again does not help."""


class TaskRefused(UsageError):
    """The engine rejects this task and ran nothing. `field` names the wrong field of the task."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class ImageRefused(UsageError):
    """The bytes are no picture that this model can read. The message says why, to follow `the picture: `."""


class GrammarTooLarge(TaskRefused):
    """The grammar is invalid, or larger than the engine's limit."""

    def __init__(self) -> None:
        super().__init__("The grammar is not valid, or too large to be enforced. Simplify the schema.", field="grammar")


class PromptTooLong(TaskRefused):
    """The prompt does not fit into the context together with at least one token of an answer."""

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        super().__init__(f"The prompt has {n_prompt} tokens, the context holds {n_ctx}. Shorten the prompt.", field="prompt")
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class TextRefused(UsageError):
    """The model's tokenizer cannot read this text within its limits of time, memory and stack. Nothing was run."""

    def __init__(self) -> None:
        super().__init__(
            "The model's tokenizer cannot read this text: it takes more time or memory than a text may. "
            "Break up very long runs without spaces, or of spaces, or shorten the text."
        )


class TaskKind(StrEnum):
    """The kind of task."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"


class PairPart(StrEnum):
    """A text in the form of a pair that a reranker reads."""

    QUERY = "query"
    DOCUMENT = "document"


class Grammar(Protocol):
    """A compiled grammar for one request. Its choices share the cost limit of its masks."""

    @property
    def begun(self) -> tuple[int, ...]:
        """The tokens of the answer that it has already consumed."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are OpenAI's, terms are llama.cpp's. Temperature 0 is greedy.

    - seed: None draws a new one.
    - grammar: the result of the engine's `grammar`, or a source that `submit` compiles. Every answer matches it, or a prefix of
      it if the token limit cuts the answer.
    - Penalties count generated tokens only, as OpenAI's do.
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
    """One sequence to run. `id` is unique among the engine's unfinished tasks.

    - begun: tokens of the answer so far. They are read like the prompt and do not count as generated.
    - max_tokens: further tokens; 0 if the begun answer lacks only its end.
    - logprobs: None for none; k for the k most likely alternatives besides the chosen token.
    - cache_scope: tasks share cached prefixes within one scope only; None shares nothing. It has no other effect.
    - fair: the pseudonyms of tenant and caller. They alone decide whose turn it is.
    - time_limit: seconds of work from the first step, waiting excluded; then the task finishes as "length".
    - group: the request whose choices share this prompt. It is read once; pass the choices to `submit_all`.
    - given: the tokens of an answer to score, one `Token` for each. `max_tokens` is their number.
    - adapter: the engine's adapter that computes it; None: the base model alone.
    - images: pictures of the prompt, in order. Each stands where `prompt` has as many tokens, of any kind, as it takes. Such a
      task uses no cache and never has the slots: one of them runs at a time, beside the others.
    - lens: of a given answer, how many layers to read at most; 0: none. Such a task uses no cache and never has the slots.
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
    given: tuple[int, ...] = field(default=(), repr=False)
    adapter: str | None = None
    lens: int = 0
    images: tuple[PlacedImage, ...] = field(default=(), repr=False)

    @property
    def sequence(self) -> tuple[int, ...]:
        """All tokens before the first sampled one."""
        return self.prompt + self.begun


@dataclass(frozen=True, slots=True)
class Alternative:
    """A possible token. raw: its bytes, which may be incomplete UTF-8. logprob: natural, before sampling."""

    id: int = field(repr=False)
    raw: bytes = field(repr=False)
    logprob: float


@dataclass(frozen=True, slots=True)
class LayerView:
    """What the model would say from one layer's state. layer: counted from 0. rank: of the answer's token; 1 is the likeliest.
    logprob: of that token, natural. says: the bytes of the likeliest token.
    """

    layer: int
    rank: int
    logprob: float
    says: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token.

    text: the text that this token releases: whole code points, never the beginning of a stop string; often "".
    raw: the token's own bytes. logprob, top: set if the task asks for them. cached_tokens: prompt tokens from the cache.
    layers: of a task with a lens, by ascending layer.
    """

    id: int = field(repr=False)
    text: str = field(repr=False)
    raw: bytes = field(repr=False)
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()
    cached_tokens: int = 0
    layers: tuple[LayerView, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """The result of an `EMBED` task; of a `RERANK` task one number, the score: higher is better."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a task. text: held-back text that was no stop string after all. prompt_tokens: includes the begun tokens.
    stop: the stop string that the text met.
    """

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    text: str = field(default="", repr=False)
    stop: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """Progress of a prompt that takes several steps: the number of tokens read. cached_tokens: those of them from the cache."""

    prompt_tokens: int
    cached_tokens: int


Event = PromptProgress | Token | Embedding | Finish


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that controls the model and must never result from a user's text. text: its form in templates.

    lstrip, rstrip: the tokenizer removes white space before or after it.
    """

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


class ReadImage(Protocol):
    """A picture as one model reads it."""

    @property
    def tokens(self) -> int:
        """That it takes of a prompt, at least one."""
        ...


class ImageReader(Protocol):
    """Reads pictures for one model. Any thread may call it."""

    async def read(self, data: bytes) -> ReadImage:
        """data: a PNG, JPEG, GIF or WebP file. Raises `ImageRefused`, or `EngineError` once the engine is closed."""
        ...

    def close(self) -> None:
        """Called by its engine. It reads nothing more."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """at: the index of its first token in the prompt."""

    at: int
    image: ReadImage


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The tokens with which a model fills in a middle. They stand before the text ahead of it, before the text behind it, and
    before the middle itself. separator: between files, if the model knows one.
    """

    before: ControlToken
    after: ControlToken
    middle: ControlToken
    separator: ControlToken | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model's properties. digest: "sha256:" and the hex digest of the file. created: Unix time of the file.

    - longest_piece: bytes of the longest token. A text longer than `n_ctx * longest_piece` cannot fit.
    - n_embd: numbers in an embedding. frame: the tokens before and after a text to embed.
    - infill: None: the model's file names no such tokens.
    - images: how the model reads pictures; None: it reads text alone.
    - pair: how a reranker reads a query and a document: the texts, and ids of tokens around them.
    - control_ids: computed from `control_tokens`; a given value is ignored.
    - spoken_ids: control tokens that are text in an answer; see `Engine.speak`.
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
    infill: InfillTokens | None = None
    pair: tuple[PairPart | tuple[int, ...], ...] = ()
    images: ImageReader | None = field(default=None, repr=False, compare=False)
    control_ids: frozenset[int] = frozenset()
    spoken_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        # Computed once, not for each of a request's thousands of texts: a vocabulary may have thousands of control tokens.
        object.__setattr__(self, "control_ids", frozenset(token.id for token in self.control_tokens))


def check(task: Task, model: ModelInfo) -> None:
    """Checks what no engine can run. Raises `TaskRefused` or `PromptTooLong`."""
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
    if not all(0 <= token < model.n_vocab and _speakable(token, model) for token in task.begun):
        raise TaskRefused("The begun answer contains a token that no answer can have.", field="begun")
    if task.lens and not task.given:
        raise TaskRefused("A lens reads a given answer.", field="lens")
    if task.given:
        _check_given(task, model)
    if task.images:
        _check_images(task, model)
    if not all(0 <= token < model.n_vocab for token in task.sampling.logit_bias):
        raise TaskRefused("The logit bias names a token that the model does not have.", field="logit_bias")


def _check_images(task: Task, model: ModelInfo) -> None:
    if model.images is None or task.given:
        raise TaskRefused("This model reads no images, or reads them for no given answer.", field="images")
    end = 0
    for placed in task.images:
        if placed.at < end:
            raise TaskRefused("The images of a prompt must be in order.", field="images")
        end = placed.at + placed.image.tokens
    if end >= len(task.prompt):
        raise TaskRefused("A prompt must go on behind its last image.", field="images")


def _speakable(token: int, model: ModelInfo) -> bool:
    """Whether an answer may contain it."""
    return token not in model.control_ids or token in model.spoken_ids


def _check_given(task: Task, model: ModelInfo) -> None:
    if len(task.given) != task.max_tokens or task.begun or task.stop or task.sampling.grammar is not None:
        raise TaskRefused("A given answer has neither a beginning, stop strings nor a grammar.", field="given")
    if len(task.prompt) + len(task.given) > model.n_ctx:
        raise PromptTooLong(len(task.prompt) + len(task.given), model.n_ctx)
    if not all(0 <= token < model.n_vocab and _speakable(token, model) for token in task.given):
        raise TaskRefused("The given answer contains a token that no answer can have.", field="given")


class Engine(Protocol):
    """Runs tasks on one model. All methods but `grammar` and `close` return at once; any thread may call any method."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def died(self) -> bool:
        """Whether it ended unexpectedly. It runs nothing any longer, and its process must end."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether a step has taken so long that it will probably never end."""
        ...

    def submit(self, task: Task) -> AsyncIterator[Event]:
        """Queues a task. Call it inside a running event loop, and iterate the result in that loop.

        Raises `TaskRefused` (or `PromptTooLong`) at once. The iterator raises `EngineError` if the engine fails, and
        `GrammarTooCostly` if the task's grammar is too costly. Any method of an engine with a process of its own may raise
        `EngineLost`, and so may its iterators. A caller that stops iterating before the `Finish` must call
        `cancel`.
        """
        ...

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        """Queues the choices of one request together: all or none. Raises as `submit`."""
        ...

    def cancel(self, task_id: str) -> None:
        """Ends a task within one step, with `Finish("cancelled")`. An unknown or finished task is not an error."""
        ...

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The token ids of the program's own text, for example a template's literal. Blocks.

        special: whether the text of a control token becomes that token.
        """
        ...

    def speak(self, tokens: Sequence[int]) -> None:
        """Makes control tokens text in answers: models mark calls and reasoning with them. A token that ends an answer stays
        silent. Call it before the first task.
        """
        ...

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        """The text that each of these tokens of an answer releases, as in `Token.text`. They are its first tokens."""
        ...

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each of a user's texts. No control token is recognized in them.

        Raises `TextRefused` for a text that exceeds the limits, and `EngineError`. It neither blocks the event loop nor waits
        for the model.
        """
        ...

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        """Compiles a grammar in llguidance's Lark form, positioned after the begun tokens of an answer.

        It may take some tenths of a second, so call it in a thread. Raises `TaskRefused`, or `GrammarTooLarge` if the grammar
        itself is at fault.
        """
        ...

    def close(self) -> None:
        """Ends every task as cancelled and frees the model. Waits for the running step."""
        ...
