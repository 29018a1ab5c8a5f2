"""Makes a chat request from the program's arguments: the body to seal, and the options of this one call.

Rules:
- A wrong argument is a `UsageError` that names the place, before anything is fetched or sent.
- `timeout`, `extra_headers`, `extra_query` and `extra_body` are options of the call, as in OpenAI's packages: none is a member
  of the body by itself.
- The body is written at once: later changes of the program's lists have no effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Unpack

import httpx2

from lacre.chat import structured
from lacre.chat.params import CallOptions
from lacre.errors import UsageError
from lacre.runtime import arguments

# levels of lists and mappings in a body; a schema has some tens, and a value that contains itself has no end
MAX_DEPTH: Final = 200
MAX_BITS: Final = 1024  # of a whole number; Python refuses over 4300 digits, and servers read 64 bits
JSON_HEADERS: Final = {"content-type": "application/json"}
_ROLES: Final = "one message is a mapping such as {'role': 'user', 'content': 'Hello.'}"

Messages = str | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """content: the JSON body. options: of `httpx2.Client.request`."""

    content: bytes = field(repr=False)
    options: dict[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls,
        messages: Messages,
        params: Mapping[str, Any],
        *,
        stream: bool,
        schema: object = None,
        **options: Unpack[CallOptions],
    ) -> ChatRequest:
        """schema: the type or the JSON schema that the answer must fit. Raises UsageError. Asks a stream for its usage, unless
        the caller sets that option.
        """
        body: dict[str, Any] = {"messages": turns_of(messages), **params}
        if schema is not None:
            if body.get("response_format") is not None:
                raise UsageError("schema and response_format both say what the answer must fit: pass one of them")
            body["response_format"] = structured.format_of(schema)
        return cls._of(body, options, stream=stream)

    @classmethod
    def about(cls, body: Mapping[str, Any], options: CallOptions) -> ChatRequest:
        """A request that never streams. Raises UsageError."""
        return cls._of(body, options, stream=False)

    @classmethod
    def _of(cls, given: Mapping[str, Any], options: CallOptions, *, stream: bool) -> ChatRequest:
        extra_body, extra_query = options.get("extra_body"), options.get("extra_query")
        timeout: object = options.get("timeout", ...)
        if unknown := options.keys() - CallOptions.__annotations__:
            raise UsageError(f"{min(unknown)!r} is not an option of a call: see `lacre.chat.params.CallOptions`")
        if extra_body is not None and not isinstance(extra_body, Mapping):
            raise UsageError(f"extra_body must be a mapping, not {arguments.kind_of(extra_body)}")
        body = {**given, **(extra_body or {})}
        _check_stream(body.pop("stream", None), stream=stream)
        _check_model(body)
        if stream:
            body = {"stream_options": {"include_usage": True}, **body, "stream": True}
        sent: dict[str, Any] = {"headers": {**arguments.headers(options.get("extra_headers"), "extra_headers"), **JSON_HEADERS}}
        if extra_query is not None:
            sent["params"] = arguments.fields(extra_query, "extra_query")
        if timeout is not ... and timeout is not httpx2.USE_CLIENT_DEFAULT:
            sent["timeout"] = arguments.timeout(timeout)
        return cls(encode(body), sent)


def encode(body: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8. Raises UsageError, which names the place of a value that JSON cannot express."""
    plain = _plain(body, "", 0)
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def turns_of(messages: object) -> list[Mapping[str, Any]]:
    """A string stands for one message of the user."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        raise UsageError("messages must be a string or a list of messages, not a single message: put it in a list")
    if isinstance(messages, bytes | bytearray | memoryview):
        raise UsageError(f"messages must be a string, not {arguments.kind_of(messages)}: decode it")
    if not isinstance(messages, Iterable):
        raise UsageError(f"messages must be a string or a list of messages, not {arguments.kind_of(messages)}")
    turns = list(messages)
    for place, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UsageError(f"messages[{place}]: {_ROLES}; this is {arguments.kind_of(turn)}")
    return turns


def _check_stream(asked: object, *, stream: bool) -> None:
    if asked is None or asked is stream:
        return
    if asked is True:
        raise UsageError("stream: chat returns a whole answer; call chat_stream for one that arrives piece by piece")
    if asked is False:
        raise UsageError("stream: chat_stream always streams; call chat for a whole answer")
    raise UsageError(f"stream: chat and chat_stream set this themselves; omit it (it was {arguments.kind_of(asked)})")


def _check_model(body: dict[str, Any]) -> None:
    """Only None stands for the pool's first model."""
    if body.get("model") is None:
        body.pop("model", None)
    else:
        arguments.text(body["model"], "model")


def _plain(value: object, place: str, depth: int) -> Any:
    """The value in JSON's types: mappings become dicts, and tuples lists. place: its name for a person."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise UsageError(f"{place}: a whole number of over {MAX_BITS} bits, which no server reads")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return arguments.unicode_text(value, place)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{place}: {value} is not a number in JSON")
        return value
    if depth == MAX_DEPTH:
        raise UsageError(f"{place[:80]}…: nested over {MAX_DEPTH} deep, or contains itself")
    if isinstance(value, Mapping):
        return {
            _name(key, place): _plain(each, f"{place}.{key}" if place else str(key), depth + 1) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each, f"{place}[{i}]", depth + 1) for i, each in enumerate(value)]
    raise UsageError(f"{place}: {arguments.kind_of(value)} has no form in JSON; pass text, numbers, lists and mappings")


def _name(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise UsageError(f"{place or 'the body'}: names must be strings in JSON, and one is {arguments.kind_of(key)}")
    return arguments.unicode_text(key, place or "the body")
