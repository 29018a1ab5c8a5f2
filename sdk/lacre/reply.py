"""OpenAI's chat format, as far as the SDK itself reads and writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from lacre.errors import ApiError, InvalidMessage, LacreError, TruncatedStream
from lacre.transport import FACTS, REFUSAL

CHAT_PATH: Final = "/v1/chat/completions"
DONE: Final = "[DONE]"  # what ends a stream of events in OpenAI's format

Messages = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of the prompt (`cached`: of them, those reused from the prefix cache) and of the answer."""

    prompt: int
    completion: int
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: it is made only after the seal's final chunk has opened.

    finish_reason: OpenAI's `stop`, `length` and so on. attempts: how often the request was sealed and sent.
    raw: the whole JSON object.
    """

    id: str
    model: str
    text: str
    finish_reason: str
    usage: TokenUsage
    attempts: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, response: httpx2.Response) -> Reply:
        """Raises what `check` raises, and InvalidMessage for an answer that is no chat completion."""
        body = checked_json(response)
        try:
            choice = body["choices"][0]
            usage = body["usage"]
            details = usage.get("prompt_tokens_details") or {}
            return cls(
                id=str(body["id"]),
                model=str(body["model"]),
                text=choice["message"].get("content") or "",
                finish_reason=str(choice["finish_reason"]),
                usage=TokenUsage(usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens", 0)),
                attempts=response.extensions[FACTS].attempts,
                raw=body,
            )
        except (KeyError, IndexError, TypeError, AttributeError) as exc:
            raise InvalidMessage("the worker's answer is not a chat completion") from exc


def chat_body(messages: Messages, params: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """The request body; a string stands for one message of the user."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(message) for message in messages]
    return {"messages": turns, **params, **({"stream": True} if stream else {})}


def check(response: httpx2.Response) -> None:
    """Raises the gateway's RefusedError, or for an error from inside the seal an ApiError. The body must have been read."""
    refusal = response.extensions.get(REFUSAL)
    if isinstance(refusal, LacreError):
        raise refusal
    if response.status_code >= 400:
        raise api_error(response.status_code, response.content)


def checked_json(response: httpx2.Response) -> dict[str, Any]:
    check(response)
    return _object(response.content)


def api_error(status: int, content: bytes) -> ApiError:
    """The error in OpenAI's shape, or a problem document's title."""
    try:
        body = _object(content)
    except InvalidMessage:
        body = {}
    error = body.get("error")
    if not isinstance(error, dict):
        error = {"message": body.get("title"), "code": body.get("type")}
    code = error.get("code")
    return ApiError(
        str(error.get("message") or f"the worker answered with status {status}"),
        status=status,
        code=code if isinstance(code, str) else None,
        type=str(error.get("type") or "api_error"),
    )


class Deltas:
    """The text in a stream of chat completion chunks, event by event. `close` raises TruncatedStream before `[DONE]`."""

    def __init__(self) -> None:
        self._done = False

    def feed(self, data: str) -> str:
        """The text that one event adds; mostly some characters, sometimes none."""
        if self._done or data == DONE:
            self._done = True
            return ""
        chunk = _object(data.encode())
        if "error" in chunk:
            raise api_error(500, data.encode())
        try:
            return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"] if choice.get("index", 0) == 0)
        except (KeyError, TypeError, AttributeError) as exc:
            raise InvalidMessage("an event in the answer is not a chat completion chunk") from exc

    def close(self) -> None:
        if not self._done:
            raise TruncatedStream("the answer ended before its last event: what came so far is not the whole of it")


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage("the worker's answer is not JSON") from exc
    if not isinstance(value, dict):
        raise InvalidMessage("the worker's answer is not a JSON object")
    return value
