"""Chat completions: `chat.completion` and its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from lacre.asgi import Usage
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.conversation import ConversationFace
from lacre_backend.api.faces.face import Ending, ServerEvent
from lacre_backend.api.requests import ChatCompletionRequest, parse_chat
from lacre_backend.api.responses import LEAST_LOGPROB, ResponseInfo, usage
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.engine.protocol import Token

DONE: Final = b"data: [DONE]\n\n"


class Chat(ConversationFace[ChatCompletionRequest]):
    """`POST /v1/chat/completions`."""

    prompt_param = "messages"
    prefix = "chatcmpl-"
    marked = True

    def parse(self, body: bytes) -> ChatCompletionRequest:
        return parse_chat(body)

    def writer(self, request: ChatCompletionRequest, reply: ResponseInfo) -> ChatWriter:
        return ChatWriter(reply)


def _logprob(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def token_logprob(token: Token) -> dict[str, Any]:
    """token: one whose logprob was requested."""
    top = [_logprob(each.raw, each.logprob) for each in token.top]
    return {**_logprob(token.raw, token.logprob or 0.0), "top_logprobs": top}


def spoken(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Speech))


def thought(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Thought))


def called(parts: Sequence[Part]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Called):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        elif isinstance(part, Argued):
            calls[part.index]["function"]["arguments"] += part.text
    return calls


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients read: llama-server's, and that of vLLM and OpenRouter."""
    return {"reasoning_content": text, "reasoning": text}


def _delta(part: Part) -> dict[str, Any]:
    """A call begins with its name; its arguments follow piece by piece."""
    match part:
        case Speech():
            return {"content": part.text}
        case Thought():
            return _reasoning(part.text)
        case Called():
            opened = {"name": part.name, "arguments": ""}
            return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": opened}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


class ChatWriter:
    """`chat.completion` and its chunks."""

    end_mark: ClassVar[bytes] = DONE

    def __init__(self, reply: ResponseInfo) -> None:
        self._usage_asked = reply.usage_asked
        self._whole = reply.head("chat.completion")
        self._chunk = reply.head("chat.completion.chunk") | ({"usage": None} if reply.usage_asked else {})

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        content = [token_logprob(token) for token in tokens if token.logprob is not None]
        return {"content": content, "refusal": None} if content else None

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], ending: Ending) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": spoken(parts), "refusal": None}
        if reasoning := thought(parts):
            message |= _reasoning(reasoning)
        if calls := called(parts):
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": ending.reason}

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        return {**self._whole, "choices": list(choices), "usage": usage(spent)}

    def first(self, index: int, spent: Usage) -> Iterator[ServerEvent]:
        yield self._delta(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> Iterator[ServerEvent]:
        yield self._delta(index, _delta(part), self.logprobs(tokens), None)

    def last(self, index: int, ending: Ending) -> Iterator[ServerEvent]:
        yield self._delta(index, {}, None, ending.reason)

    def end(self, spent: Usage) -> Iterator[ServerEvent]:
        if self._usage_asked:
            yield ServerEvent({**self._chunk, "choices": [], "usage": usage(spent)})

    def broken(self, refusal: RequestRefused) -> ServerEvent:
        return ServerEvent(refusal.body())

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> ServerEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return ServerEvent({**self._chunk, "choices": [choice]})
