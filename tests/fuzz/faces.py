"""Targets of the APIs beside OpenAI's chat: what a caller may send to each, and the shape of its refusals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from fuzz.backend import TEMPLATE, only_its_own_control_tokens
from fuzz.target import Target
from lacre_backend.api import media
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.infill import Infill, InfillRequest
from lacre_backend.api.faces.messages_request import parse_messages
from lacre_backend.api.faces.refused import refused_at
from lacre_backend.api.faces.responses_request import parse_responses
from lacre_backend.api.messages import check_media
from lacre_backend.api.requests import ChatCompletionRequest
from lacre_backend.api.reranking import RerankRequest, parse_rerank
from lacre_backend.api.template.prompt import Piece, TemplateRefused
from lacre_backend.upstream.media import check_media as check_forwarded

# How a refusal names its kind, by whether it is in OpenAI's shape
_OPENAI: Final = {"message", "type", "param", "code"}
_FORMATS: Final = ("image/png", "image/jpeg", "image/gif", "image/webp", "audio/wav", "audio/mp3")


def told(path: str, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """As `parse`; and what it refuses can be written down in the shape of the API of this path."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except RequestRefused as refusal:
            error = json.loads(json.dumps(refused_at(path, refusal), allow_nan=False).encode())
            assert 400 <= refusal.status < 500 and error["error"]["message"]
            assert error["error"].keys() == ({"type", "message"} if path == "/v1/messages" else _OPENAI)
            raise

    return parsed


def rendered(parse: Callable[[bytes], ChatCompletionRequest]) -> Callable[[bytes], tuple[int, tuple[Piece, ...]] | None]:
    """How many messages a request amounts to, and its prompt; None where the template does not take it."""

    def render(data: bytes) -> tuple[int, tuple[Piece, ...]] | None:
        request = parse(data)
        check_media(request.messages, request.model)
        calling = request.calling()
        tools = [] if calling is None else [tool.for_template() for tool in calling.tools]
        try:
            return len(request.messages), TEMPLATE.render([each.for_template() for each in request.messages], tools or None)
        except TemplateRefused:
            return None

    return render


def whole_texts(_data: bytes, request: InfillRequest) -> None:
    assert (request.n_predict or 1) > 0
    for text in (request.input_prefix, request.input_suffix, request.prompt, *(each.text for each in request.input_extra)):
        text.encode()


def every_document(_data: bytes, request: RerankRequest) -> None:
    assert request.query and all(request.documents) and (request.top_n or 1) > 0


def one_file(data: bytes) -> media.Media:
    """The first byte: the format that is named."""
    kind = _FORMATS[data[0] % len(_FORMATS)] if data else "image/png"
    content = base64.b64encode(data[1:]).decode()
    if kind.startswith("audio/"):
        sound = {"data": content, "format": kind.removeprefix("audio/")}
        return media.of_chat({"type": "input_audio", "input_audio": sound}, "at")
    return media.of_chat({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{content}"}}, "at")


def as_it_came(data: bytes, found: media.Media) -> None:
    assert found.data == data[1:] and found.type == _FORMATS[data[0] % len(_FORMATS)]


def forwarded(data: bytes) -> Any:
    """A body for another program."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestRefused("no JSON") from None
    if not isinstance(body, dict):
        raise RequestRefused("no object")
    check_forwarded(body)
    return body


def names_nobody(_data: bytes, body: dict[str, Any]) -> None:
    """No member that servers take for an address of media holds one, wherever they look for content."""
    waiting: list[Any] = [body.get(name) for name in ("messages", "input", "system")]
    while waiting:
        match waiting.pop():
            case list() as items:
                waiting += items
            case dict() as part:
                waiting += [part.get("content"), part.get("output")]
                for name in ("image_url", "audio_url", "video_url", "file_url"):
                    held = part.get(name)
                    address = held.get("url") if isinstance(held, dict) else held
                    assert not isinstance(address, str) or address[:5].lower() == "data:"


def body(**members: Any) -> bytes:
    return json.dumps({"model": "tiny", **members}).encode()


def seeds() -> Sequence[tuple[str, str, bytes]]:
    """Small bodies of every kind."""
    ask = {"role": "user", "content": "How is the tide? <|end|>"}
    schema = {"type": "object", "properties": {"port": {"type": "string"}}}
    said = {"type": "output_text", "text": "Hi"}
    items = [
        ask,
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "content": None},
        {"role": "assistant", "content": [said], "phase": "final"},
        {"type": "function_call", "call_id": "c", "name": "tide", "namespace": "sea", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "d", "name": "sh", "input": "ls"},
        {"type": "function_call_output", "call_id": "c", "output": "2 m"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "a"}]},
    ]
    tools = [
        {"type": "namespace", "name": "sea", "tools": [{"type": "function", "name": "tide", "parameters": schema}]},
        {"type": "custom", "name": "sh", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}},
    ]
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": "x"},
                {"type": "text", "text": "Look"},
                {"type": "tool_use", "id": "t", "name": "tide", "input": {"port": "Faro"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "2 m", "is_error": True}]},
    ]
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x02\x00\x00\x00\x03\x08\x02\x00\x00\x00"
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08\x00\x05\x00\x07\x01\x01\x11\x00\xff\xd9"
    webp = b"RIFF\x1e\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x04\x00\x00"
    return (
        ("responses_request", "text", body(input="Hi", instructions="Be brief", max_output_tokens=9, store=False)),
        ("responses_request", "items", body(input=items, tools=tools, reasoning={"effort": "low"}, include=[])),
        ("messages_request", "text", body(messages=[ask], max_tokens=9, system="Be brief", stop_sequences=["x"])),
        (
            "messages_request",
            "blocks",
            body(messages=blocks, max_tokens=9, tools=[{"name": "tide", "input_schema": schema}], tool_choice={"type": "any"}),
        ),
        ("infill_request", "files", body(input_prefix="a", input_suffix="b", input_extra=[{"text": "c"}], n_predict=-1)),
        ("rerank_request", "texts", body(query="a", documents=["b", {"text": "c"}], top_n=1)),
        ("media", "png", b"\x00" + png),
        ("media", "jpeg", b"\x01" + jpeg),
        ("media", "gif", b"\x02GIF89a\x02\x00\x03\x00\x00\x00\x00;"),
        ("media", "webp", b"\x03" + webp),
        ("media", "wav", b"\x04RIFF\x04\x00\x00\x00WAVE"),
        ("media", "mp3", b"\x05ID3\x04"),
        (
            "forwarded_media",
            "inside",
            body(messages=[{"role": "user", "content": [{"image_url": {"url": "data:,x"}}, {"source": {"url": "data:,"}}]}]),
        ),
    )


TARGETS: Final = (
    Target(
        "responses_request",
        told("/v1/responses", rendered(parse_responses)),
        (RequestRefused,),
        only_its_own_control_tokens,
        json=True,
    ),
    Target(
        "messages_request",
        told("/v1/messages", rendered(parse_messages)),
        (RequestRefused,),
        only_its_own_control_tokens,
        json=True,
    ),
    Target("infill_request", told("/infill", Infill().parse), (RequestRefused,), whole_texts, json=True),
    Target("rerank_request", told("/v1/rerank", parse_rerank), (RequestRefused,), every_document, json=True),
    Target("media", told("/v1/chat/completions", one_file), (RequestRefused,), as_it_came),
    Target("forwarded_media", told("/v1/responses", forwarded), (RequestRefused,), names_nobody, json=True),
)
