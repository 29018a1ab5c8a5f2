"""What a worker and the process of its engine say to each other. It does no I/O.

A frame is 4 bytes of length, little-endian, one byte for the kind of message, and the message by `codec`. The length counts the
kind and the message.

Rules:
- A length is checked before the frame is kept.
- Each side knows only the other side's kinds, so a message cannot be sent back.
- Errors cross as a kind from a fixed list and their own message, which never contains a prompt or an answer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Final, Self

from lacre.errors import InvalidMessage, LacreError, SettingsError, UsageError
from lacre.wire.wiping import overwrite
from lacre_backend.engine.protocol import (
    EngineClosed,
    EngineError,
    Event,
    Grammar,
    GrammarTooCostly,
    GrammarTooLarge,
    ImageReader,
    ImageRefused,
    LensUnsupported,
    ModelInfo,
    PromptTooLong,
    ReadImage,
    Task,
    TaskRefused,
    TextRefused,
)
from lacre_backend.engine_process.codec import Codec
from lacre_backend.models.checksum import DamagedModel
from lacre_backend.models.chunked import SealedModelInvalid
from lacre_backend.models.signatures import UntrustedModel
from lacre_fabric.keys.kms import KeyWithheld, KmsError, KmsUnreachable, WrongWrapping

# The largest real ones are a vocabulary, some megabytes, and the tokens of a text as long as a sealed request, 28 MiB.
MAX_FRAME: Final = 64 * 2**20
_TOO_MUCH: Final = f"The request's prompts take more than {MAX_FRAME // 2**20} MiB as tokens. Send them in several requests."
_HEAD: Final = struct.Struct("<IB")
_KIND: Final = 1  # bytes of a frame's kind


@dataclass(frozen=True, slots=True, weakref_slot=True)
class HeldGrammar:
    """A compiled grammar that the child keeps by number."""

    number: int
    begun: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class HeldImage:
    """A picture that the child keeps by number."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An error. kind: from `_KINDS`. The numbers are `PromptTooLong`'s."""

    kind: int
    message: str = field(repr=False)
    remedy: str = ""
    field: str = ""
    n_prompt: int = 0
    n_ctx: int = 0


# To the child


@dataclass(frozen=True, slots=True)
class Load:
    """The first message. settings: of the model, as JSON. scheme: of the key management service; empty: there is none."""

    settings: str
    scheme: str


@dataclass(frozen=True, slots=True)
class ModelKey:
    """The answer to `WantKey`: one of both."""

    key: bytes | None = field(repr=False)
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """Tasks, all or none. `of` makes it, and `whole` gives the tasks back.

    prompts: each once, because the choices of a request share theirs. which: the place of each task's prompt among them; its
    own field is empty.
    """

    tasks: tuple[Task, ...]
    prompts: tuple[tuple[int, ...], ...] = field(repr=False)
    which: tuple[int, ...]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Self:
        prompts = {id(task.prompt): task.prompt for task in tasks}  # to compare or hash long ones would take too long
        places = {name: place for place, name in enumerate(prompts)}
        bare = tuple(replace(task, prompt=()) for task in tasks)
        return cls(bare, tuple(prompts.values()), tuple(places[id(task.prompt)] for task in tasks))

    def whole(self) -> tuple[Task, ...]:
        """Raises InvalidMessage."""
        if len(self.which) != len(self.tasks) or not all(0 <= place < len(self.prompts) for place in self.which):
            raise InvalidMessage("a task has no prompt")
        return tuple(replace(task, prompt=self.prompts[place]) for task, place in zip(self.tasks, self.which, strict=True))


@dataclass(frozen=True, slots=True)
class Cancel:
    task: str


@dataclass(frozen=True, slots=True)
class Speak:
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OwnText:
    """Asks for the tokens of the program's own text."""

    number: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class UserTexts:
    """Asks for the tokens of users' texts."""

    number: int
    texts: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Compile:
    """Asks for a grammar, which gets this number."""

    number: int
    source: str = field(repr=False)
    begun: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Picture:
    """Asks to read a picture, which gets this number."""

    number: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Forget:
    """Grammars and pictures that no one uses any longer, or questions whose asker has gone."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Ends every task as cancelled, and then the process."""


ToChild = Load | ModelKey | Submit | Cancel | Speak | OwnText | UserTexts | Compile | Picture | Forget | Close


# From the child


@dataclass(frozen=True, slots=True)
class WantKey:
    """Asks, while it loads, to unwrap the key of a sealed model. digest: of the model."""

    wrapped: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded. info: without its reader of images. pieces, ends: of the vocabulary. adapters: names and digests."""

    info: ModelInfo
    pieces: tuple[bytes, ...] = field(repr=False)
    ends: tuple[int, ...]
    slots: int
    adapters: tuple[tuple[str, str], ...]
    sees: bool


@dataclass(frozen=True, slots=True)
class Unloadable:
    """The model cannot be loaded."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """An event of a task."""

    task: str
    event: Event


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a task that failed."""

    task: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Answered:
    """To `OwnText` and `UserTexts`: the ids of each text. To `Compile`: nothing. To `Picture`: its number of tokens."""

    number: int
    ids: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Unanswered:
    number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Pulse:
    """Sent each second. stuck: as `Engine.stuck`."""

    stuck: bool


FromChild = WantKey | Ready | Unloadable | TaskEvent | Failed | Answered | Unanswered | Pulse
Message = ToChild | FromChild

_STANDS_FOR: Final = {Grammar: HeldGrammar, ReadImage: HeldImage, ImageReader: NoneType}
TO_CHILD: Final = (Load, ModelKey, Submit, Cancel, Speak, OwnText, UserTexts, Compile, Picture, Forget, Close)
FROM_CHILD: Final = (WantKey, Ready, Unloadable, TaskEvent, Failed, Answered, Unanswered, Pulse)
_CODECS: Final[Mapping[type[Any], tuple[int, Codec[Any]]]] = {
    kind: (number, Codec(kind, _STANDS_FOR)) for kinds in (TO_CHILD, FROM_CHILD) for number, kind in enumerate(kinds)
}


def framed(message: Message) -> bytearray:
    """Raises UsageError if the message is too large, and TaskRefused if that are tasks."""
    number, codec = _CODECS[type(message)]
    frame = codec.encode(message, _HEAD.size)
    length = len(frame) - _HEAD.size
    if length + _KIND > MAX_FRAME:
        if isinstance(message, Submit):
            raise TaskRefused(_TOO_MUCH, field="prompt")
        raise UsageError(f"a {type(message).__name__} of {length} bytes is larger than the {MAX_FRAME} of one message")
    _HEAD.pack_into(frame, 0, length + _KIND, number)
    return frame


class Unframer:
    """Makes messages of bytes as they come. kinds: `TO_CHILD` or `FROM_CHILD`, whichever this side reads.

    secret: whether it overwrites its own copies of the messages, because one of them has a key.
    """

    def __init__(self, kinds: tuple[type[Any], ...], *, secret: bool = False) -> None:
        self._codecs = [_CODECS[kind][1] for kind in kinds]
        self._held = bytearray()
        self.secret = secret

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete. Raises InvalidMessage; read nothing more then."""
        held = self._held
        held += data
        messages, at = [], 0
        while len(held) - at >= _HEAD.size:
            length, number = _HEAD.unpack_from(held, at)
            if not _KIND <= length <= MAX_FRAME or number >= len(self._codecs):
                raise InvalidMessage("an engine's process sent no message, or one that is too large")
            begin, end = at + _HEAD.size, at + _HEAD.size - _KIND + length
            if len(held) < end:
                break
            with memoryview(held)[begin:end] as part:
                body = bytes(part)
            messages.append(self._codecs[number].decode(body))
            if self.secret:
                overwrite(body)
            at = end
        if self.secret:
            held[:at] = bytes(at)
        del held[:at]
        return messages


# Errors

_KINDS: Final[tuple[type[LacreError], ...]] = (
    EngineError, EngineClosed, LensUnsupported, GrammarTooCostly, TaskRefused, GrammarTooLarge, PromptTooLong, TextRefused,
    ImageRefused, SettingsError, DamagedModel, UntrustedModel, SealedModelInvalid, WrongWrapping, KeyWithheld, KmsUnreachable,
    KmsError, LacreError,
)  # fmt: skip


def told(error: LacreError) -> Failure:
    """As the nearest kind that crosses."""
    kind = next(kind for kind in type(error).__mro__ if kind in _KINDS)
    refusal = error if isinstance(error, TaskRefused) else None
    long = error if isinstance(error, PromptTooLong) else None
    return Failure(
        _KINDS.index(kind),
        str(error),
        error.remedy,
        "" if refusal is None else refusal.field,
        0 if long is None else long.n_prompt,
        0 if long is None else long.n_ctx,
    )


def raised(failure: Failure) -> LacreError:
    """The error again. Raises InvalidMessage for an unknown kind."""
    if not 0 <= failure.kind < len(_KINDS):
        raise InvalidMessage("an engine's process failed in an unknown way")
    kind = _KINDS[failure.kind]
    error = kind.__new__(kind, failure.message)  # not by its constructor: each kind takes other arguments
    error.remedy = failure.remedy
    if isinstance(error, TaskRefused):
        error.field = failure.field
    if isinstance(error, PromptTooLong):
        error.n_prompt, error.n_ctx = failure.n_prompt, failure.n_ctx
    return error
