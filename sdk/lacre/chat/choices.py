"""A model's answer: choices with their text, function calls and log probabilities; whole, or delta by delta.

Rules:
- Nothing received is dropped: members without a name here are in `Choice.message`, unchanged.
- Nothing of an answer is in a `repr`, because those end up in logs.
- Values that a peer chose (indices, depth, kinds) allocate nothing by themselves, and nest no deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, overload

from lacre.chat import structured
from lacre.chat.structured import Schema, T
from lacre.errors import InvalidMessage
from lacre.runtime.json_objects import object_in

MAX_DEPTH: Final = 16  # levels of a delta that are joined; a tool call has three
# Members that are sent whole, perhaps repeatedly, but never in pieces.
_SCALARS: Final = frozenset({"role", "id", "type"})
_FORMS: Final = ("function", "custom")  # of a tool call, by its `type`
_REASONING: Final = ("reasoning_content", "reasoning")  # the names in llama-server and vLLM


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Wrap around parsing a peer's value. Raises InvalidMessage if it has the wrong form."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as exc:
        raise InvalidMessage(f"this is not {what}") from exc


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model requests. The program decides whether to make it: a model chose its content.

    id: the message with the call's result names it as `tool_call_id`. name: of the function. arguments: JSON, as the model
    wrote it; for a custom tool, its input. Cut short if `finish_reason` is `length`.
    """

    id: str
    name: str = field(repr=False)
    arguments: str = field(repr=False)
    type: str = "function"

    def parsed(self) -> dict[str, Any]:
        """The arguments as an object. Raises InvalidMessage if they are not one: the model wrote them."""
        value = object_in(self.arguments)
        if value is not None:
            return value
        wrong = InvalidMessage("the model's arguments for this call are not a JSON object, or were cut short")
        wrong.remedy = "Allow more tokens, or set `strict: true` in the tool; then ask again."
        raise wrong

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> ToolCall:
        """One of a message's `tool_calls`. Raises InvalidMessage if it is not a tool call."""
        with _reading("a tool call"):
            kind = _text(value.get("type")) or "function"
            forms = {form: _called(value.get(form)) for form in _FORMS}
            name, given = forms.get(kind, ("", ""))
            return cls(_text(value.get("id")), name, given, kind)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the answer, and the natural logarithm of its probability. raw: its bytes, if the worker sent them. top: the
    likeliest tokens in its place, if `top_logprobs` asked for them.
    """  # fmt: skip

    token: str = field(repr=False)
    logprob: float
    raw: bytes | None = field(default=None, repr=False)
    top: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> TokenLogprob:
        """Raises InvalidMessage if the value is not a token's."""
        with _reading("a token with its probability"):
            told = value.get("bytes")
            logprob = value["logprob"]
            if isinstance(logprob, bool) or not isinstance(logprob, int | float):
                raise TypeError
            likely = value.get("top_logprobs") or ()
            top = tuple(cls.parse({**each, "top_logprobs": None}) for each in likely)  # one level
            return cls(_text(value["token"]), float(logprob), None if told is None else bytes(_list(told)), top)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of an answer's choices.

    text: its content. finish_reason: OpenAI's `stop`, `length`, `tool_calls` and so on; None if there is none (yet). refusal,
    reasoning: the model's words in place of an answer, or before it. logprobs: if requested. message: the whole message, to
    append to `messages` for the next turn. schema: the request's, if it had one.
    """

    index: int
    finish_reason: str | None
    text: str = field(repr=False)
    tool_calls: tuple[ToolCall, ...] = field(repr=False)
    refusal: str | None = field(repr=False)
    reasoning: str | None = field(repr=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(repr=False)
    message: Mapping[str, Any] = field(repr=False)
    schema: Schema | None = field(default=None, repr=False, compare=False)

    @overload
    def parsed(self) -> Any: ...

    @overload
    def parsed(self, kind: type[T]) -> T: ...

    def parsed(self, kind: Any = None) -> Any:
        """The text as an instance of `kind`, such as a model of pydantic. None: of the request's `schema`, if that is a type;
        plain JSON values otherwise.

        Raises InvalidMessage if the text does not fit: it was cut short, or the request had no `schema`.
        """
        return structured.read(self.text, self.schema if kind is None else kind)

    @classmethod
    def parse(cls, choice: Mapping[str, Any], place: int, schema: Schema | None = None) -> Choice:
        """A choice of a chat completion. place: its index, if it has none of its own. schema: the request's. Raises
        InvalidMessage if it is not a choice.
        """
        with _reading("a choice of a chat completion"):
            message = choice["message"]
            if not isinstance(message, Mapping):
                raise TypeError
            reason = choice.get("finish_reason")
            return cls(
                index=_index(choice.get("index"), place),
                finish_reason=None if reason is None else _text(reason),
                text=_text(message.get("content")),
                tool_calls=tuple(map(ToolCall.parse, _list(message.get("tool_calls")))),
                refusal=_optional(message.get("refusal")),
                reasoning=_optional(_reasoning(message)),
                logprobs=_logprobs(choice),
                message=message,
                schema=schema,
            )


# The events of a stream. `choice` is the index of the event's choice.


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of a choice's text. logprobs: of the tokens received with it; some of their text may still be held back."""

    choice: int
    text: str = field(repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's reasoning before it answers."""

    choice: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RefusalDelta:
    """More of the model's refusal."""

    choice: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call. index: of the call in its choice. The first delta has `id` and `name`; `arguments` grow piece by
    piece.
    """

    choice: int
    index: int
    id: str | None = None
    name: str | None = field(default=None, repr=False)
    arguments: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is whole."""

    choice: int
    reason: str


StreamEvent = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta | Finished


class Growing:
    """One choice, joined from its deltas."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._message: dict[str, Any] = {}
        self._logprobs: list[Any] | None = None
        self.finish_reason: str | None = None

    def add(self, choice: Mapping[str, Any]) -> list[StreamEvent]:
        """The events that one chunk adds. Raises TypeError, KeyError and others if it is not a chunk's choice."""
        delta = choice["delta"]
        if not isinstance(delta, Mapping):
            raise TypeError
        events = list(self._said(choice, delta))
        _merge(self._message, delta, MAX_DEPTH)
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
            self._logprobs = self._logprobs or []
            self._logprobs += logprobs["content"]
        return events

    def _said(self, choice: Mapping[str, Any], delta: Mapping[str, Any]) -> Iterator[StreamEvent]:
        text, listed = _text(delta.get("content")), _logprobs(choice) or ()
        if reasoning := _text(_reasoning(delta)):
            yield ReasoningDelta(self._index, reasoning)
        if text or listed:
            yield TextDelta(self._index, text, listed)
        if refusal := _text(delta.get("refusal")):
            yield RefusalDelta(self._index, refusal)
        for place, call in enumerate(_list(delta.get("tool_calls"))):
            called = ToolCall.parse(call)
            index = _index(call.get("index"), place)
            yield ToolCallDelta(self._index, index, called.id or None, called.name or None, called.arguments)
        if (reason := choice.get("finish_reason")) is not None:
            self.finish_reason = _text(reason)
            yield Finished(self._index, self.finish_reason)

    def whole(self) -> dict[str, Any]:
        """The choice as in a whole chat completion; if it has not ended, the part so far."""
        message = {"role": "assistant", "content": None, **_settled(self._message)}
        logprobs = None if self._logprobs is None else {"content": self._logprobs}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


class _Text:
    """A string that grows. Its pieces are joined when it is read: joining at each piece would take quadratic time."""

    def __init__(self) -> None:
        self.parts: list[str] = []


class _Items:
    """A list whose items say their index in each delta, as `tool_calls` do."""

    def __init__(self) -> None:
        self.by_index: dict[int, dict[str, Any]] = {}


def _merge(into: dict[str, Any], delta: Mapping[str, Any], depth: int) -> None:
    for name, value in delta.items():
        if isinstance(value, str) and name not in _SCALARS:
            if not isinstance(into.get(name), _Text):
                into[name] = _Text()
            into[name].parts.append(value)
        elif isinstance(value, Mapping) and depth:
            if not isinstance(into.get(name), dict):
                into[name] = {}
            _merge(into[name], value, depth - 1)
        elif isinstance(value, list) and depth and _numbered(name, value):
            if not isinstance(into.get(name), _Items):
                into[name] = _Items()
            for place, item in enumerate(value):
                _merge(into[name].by_index.setdefault(_index(item.get("index"), place), {}), item, depth - 1)
        elif isinstance(value, list) and isinstance(into.get(name), list):
            into[name].extend(value)
        elif value is not None or name not in into:
            into[name] = list(value) if isinstance(value, list) else value


def _numbered(name: str, items: Sequence[object]) -> bool:
    """Whether each item has an index in its list; an item of `tool_calls` without one gets it by its place."""
    return all(isinstance(item, Mapping) and (name == "tool_calls" or "index" in item) for item in items)


def _settled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The message so far."""
    settled: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, _Text):
            settled[name] = "".join(value.parts)
        elif isinstance(value, _Items):
            items = (_settled(value.by_index[index]) for index in sorted(value.by_index))
            settled[name] = [{key: each for key, each in item.items() if key != "index"} for item in items]
        elif isinstance(value, dict):
            settled[name] = _settled(value)
        else:
            settled[name] = value
    return settled


def _called(value: object) -> tuple[str, str]:
    """The name and the arguments of a tool call, in either form."""
    if value is None:
        return "", ""
    if not isinstance(value, Mapping):
        raise TypeError
    return _text(value.get("name")), _text(value.get("arguments")) + _text(value.get("input"))


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError
    return value


def _optional(value: object) -> str | None:
    return _text(value) or None


def _reasoning(message: Mapping[str, Any]) -> object:
    return next((message[name] for name in _REASONING if message.get(name)), None)


def _list(value: object) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TypeError
    return value


def _index(value: object, place: int) -> int:
    if value is None:
        return place
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...] | None:
    told = choice.get("logprobs")
    if not isinstance(told, Mapping) or told.get("content") is None:
        return None
    return tuple(map(TokenLogprob.parse, _list(told["content"])))
