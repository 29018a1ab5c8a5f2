"""What a face is: how one API asks for a generation, and how it writes the answer, whole or as a stream of events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lacre.asgi import Usage
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.prompts import Prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import Generate
from lacre_backend.api.responses import ResponseInfo
from lacre_backend.api.tools.parts import Part
from lacre_backend.api.tools.thoughts import AnswerForm, Reader
from lacre_backend.engine.protocol import Token

Asked = TypeVar("Asked", bound=Generate)


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a stream (WHATWG HTML, section 9.2). name: its `event` field, if the API has names."""

    document: dict[str, Any] = field(repr=False)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice ended: `stop`, `length` or `tool_calls`. stop: the stop string that its text met, if one ended it."""

    reason: str
    stop: str | None = field(default=None, repr=False)


class AnswerWriter(Protocol):
    """Writes one answer. Of a stream it keeps where it is: the events of a choice come in order, those of several mixed.

    end_mark: the stream's last line, if the API has one.
    """

    end_mark: ClassVar[bytes]

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending) -> Any:
        """A whole choice. tokens: those whose logprobs were requested."""

    def whole(self, choices: Sequence[Any], spent: Usage) -> dict[str, Any]: ...

    def first(self, index: int, spent: Usage) -> Iterable[ServerEvent]:
        """The events that begin a choice. spent: the prompt is counted by now."""

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterable[ServerEvent]: ...

    def last(self, index: int, ending: Ending) -> Iterable[ServerEvent]:
        """The events that end a choice."""

    def end(self, spent: Usage) -> Iterable[ServerEvent]:
        """The events after all choices."""

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        """The error in place of the rest."""


class Face(ABC, Generic[Asked]):
    """One API's way to ask for a generation. prompt_param: its field that holds the prompt, for errors. prefix: of an answer's
    id. marked: whether its streams carry marks with which a client resumes them (`lacre.exchange.resume_marks`).
    """

    action: ClassVar[str]
    prompt_param: ClassVar[str]
    prefix: ClassVar[str]
    marked: ClassVar[bool] = False

    @abstractmethod
    def parse(self, body: bytes) -> Asked:
        """Raises `RequestRefused`."""

    @abstractmethod
    async def prompt(self, served: ServedModel, request: Asked) -> Prompt:
        """Raises `RequestRefused`."""

    async def prompts(self, served: ServedModel, request: Asked) -> list[Prompt]:
        """Each prompt: most APIs take one. Raises `RequestRefused`."""
        return [await self.prompt(served, request)]

    @abstractmethod
    def writer(self, request: Asked, reply: ResponseInfo) -> AnswerWriter: ...

    def reader(self, request: Asked, form: AnswerForm, seed: str) -> Reader | None:
        """A parser of a choice's text, if it may contain more than the answer's text. seed: of the ids of calls."""
        return None

    def refused(self, refusal: RequestRefused) -> dict[str, Any]:
        """The error as this API writes it."""
        return refusal.body()

    def counted(self, tokens: int) -> dict[str, Any]:
        """What a count of the prompt's tokens says."""
        return {"input_tokens": tokens}
