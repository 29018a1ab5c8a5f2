"""The vendors' own types against the API: requests made of every member that they declare, and answers read as their models.

`vendor_types.json` lists what the API refuses of these requests, and which members of answers it never sends. With a new
release of `openai` or `anthropic` the lists change, and show what is missing. `LACRE_RECORD=1` writes them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Annotated, Any, Final, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import BaseModel, TypeAdapter
from typing_extensions import is_typeddict

from backend.posting import Reply, post
from lacre_backend.api.app import create_app
from parts.echo_engine import CHAT_TEMPLATE
from parts.scripted_engine import ScriptedEngine
from parts.scripts import call

LISTS: Final = Path(__file__).parent / "vendor_types.json"
SAID: Final[Sequence[Mapping[str, Any]]] = ({"role": "user", "content": "x"},)
NAME: Final = {"model": "scripted"}
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
LEAST: Final[Mapping[str, dict[str, Any]]] = {
    CHAT: {**NAME, "messages": [*SAID]},
    TEXT: {**NAME, "prompt": "x"},
    RESPONSES: {**NAME, "input": "x"},
    MESSAGES: {**NAME, "max_tokens": 64, "messages": [*SAID]},
}
PARAMS: Final[Mapping[str, Any]] = {
    CHAT: ChatParams,
    TEXT: TextParams,
    RESPONSES: ResponseCreateParamsNonStreaming,
    MESSAGES: MessageCreateParamsNonStreaming,
}
# The models of an answer, and of an event of its stream.
ANSWERS: Final[Mapping[str, tuple[Any, Any]]] = {
    CHAT: (ChatCompletion, ChatCompletionChunk),
    TEXT: (Completion, Completion),
    RESPONSES: (Response, ResponseStreamEvent),
    MESSAGES: (Message, RawMessageStreamEvent),
}
PLAIN: Final[Mapping[Any, Any]] = {str: "x", int: 1, float: 0.5, bool: True, NoneType: None, object: "x", Any: "x"}
SCHEMA: Final = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}

pytestmark = pytest.mark.anyio


def values(hint: Any, above: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Values of this type: the least one first, then some with one more member each, of each type that the member may have."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        yield PLAIN[hint]
    elif origin in (Required, NotRequired, Annotated):
        yield from values(inner[0], above)
    elif origin is Literal:
        yield from inner
    elif origin in (Union, UnionType):
        for each in inner:
            yield from values(each, above)
    elif origin is IO or hint is os.PathLike:  # what the packages read into a text before they send it
        return
    elif is_typeddict(hint) or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        if hint not in above:
            yield from members(hint, (*above, hint))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield {}
    elif isinstance(origin, type) and issubclass(origin, Iterable):
        for each in values(inner[0], above):
            yield [each]
    else:
        raise AssertionError(f"a new kind of type: {hint}")


def members(kind: Any, above: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        needed = {name for name, hint in hints.items() if get_origin(hint) is Required}
    else:  # a piece of an answer that is sent back
        hints = {name: field.annotation for name, field in kind.model_fields.items()}
        needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    least = {name: next(values(hints[name], above)) for name in hints if name in needed}
    yield least
    for name, hint in hints.items():
        for value in values(hint, above):
            if least.get(name, ...) != value:
                yield {**least, name: value}


def requests(path: str) -> Iterator[dict[str, Any]]:
    for sent in members(PARAMS[path], ()):
        whole = {**LEAST[path], **sent, **NAME}
        if "messages" in whole:
            whole["messages"] = [*whole["messages"], *SAID]
        yield whole


@pytest.fixture(scope="module")
def lists() -> Iterator[dict[str, Any]]:
    """The recorded lists, written anew at the end if that is asked for."""
    read: dict[str, Any] = json.loads(LISTS.read_text()) if LISTS.exists() else {"refused": {}, "unsent": {}, "added": {}}
    yield read
    if "LACRE_RECORD" in os.environ:
        LISTS.write_text(json.dumps(read, indent=1, sort_keys=True) + "\n")


def settle(recorded: dict[str, Any], seen: Mapping[str, Any]) -> None:
    if "LACRE_RECORD" in os.environ:
        recorded |= seen
    assert {name: recorded.get(name) for name in seen} == seen


@pytest.mark.slow
@pytest.mark.parametrize("path", PARAMS)
async def test_each_member_that_a_vendor_declares_is_taken_or_refused_in_known_words(lists: Any, path: str) -> None:
    refused: set[str] = set()
    taken = 0
    with closing(ScriptedEngine(lambda _: "x")) as engine:
        app = create_app([engine])
        for body in requests(path):
            reply = await post(app, path, body)
            assert reply.status in (200, 400, 404), (body, reply.body)
            taken += reply.status == 200
            if reply.status != 200:
                refused.add(re.sub(r"\[\d+\]", "[]", json.loads(reply.body)["error"]["message"]))
    assert taken > 20
    # No member of the request itself is a stranger.
    assert [said for said in refused if re.match(r"Unknown parameter: '\w+'", said)] == []
    settle(lists["refused"], {path: sorted(refused)})


# Answers


def thinking(said: str) -> ScriptedEngine:
    engine = ScriptedEngine(lambda _: said, n_ctx=1 << 14)
    engine.model = dataclasses.replace(engine.model, chat_template=CHAT_TEMPLATE + "{# </think> #}")
    return engine


def asked(path: str) -> Iterator[dict[str, Any]]:
    """Requests that have all kinds of answers."""
    tool = {"name": "weather", "description": "Tells the weather"}
    match path:
        case "/v1/chat/completions":
            more = {"tools": [{"type": "function", "function": {**tool, "parameters": SCHEMA}}]}
            yield from ({}, {"logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True}}, more)
        case "/v1/responses":
            more = {"tools": [{"type": "function", **tool, "parameters": SCHEMA}, {"type": "custom", "name": "note"}]}
            yield from ({}, {"include": ["message.output_text.logprobs"], "top_logprobs": 1}, more, {"max_output_tokens": 30})
        case "/v1/messages":
            yield from ({}, {"stop_sequences": ["rains"]}, {"tools": [{**tool, "input_schema": SCHEMA}]})
        case _:
            yield from ({}, {"logprobs": 1})


def documents(reply: Reply) -> Iterator[Any]:
    """Of a stream's events."""
    for line in reply.body.decode().splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def look(value: Any, sent: dict[type[BaseModel], set[str]], added: set[str]) -> None:
    """Notes which members each model got, and what it does not declare."""
    if isinstance(value, BaseModel):
        sent[type(value)] |= value.model_fields_set & set(type(value).model_fields)
        added |= {f"{type(value).__name__}.{name}" for name in value.model_extra or {}}
        for name in value.model_fields_set:
            look(getattr(value, name), sent, added)
    elif isinstance(value, list):
        for each in value:
            look(each, sent, added)


@pytest.mark.parametrize("path", ANSWERS)
async def test_each_member_that_a_vendor_declares_is_sent_or_known_to_be_missing(lists: Any, path: str) -> None:
    whole, event = (TypeAdapter[Any](each) for each in ANSWERS[path])
    sent: dict[type[BaseModel], set[str]] = defaultdict(set)
    added: set[str] = set()
    texts = ("It rains.", "<think>\nHm.\n</think>\n\nIt rains.", call("weather", {"place": "x"}), call("note", {"input": "x"}))
    for text in texts:
        with closing(thinking(text)) as engine:
            app = create_app([engine])
            for more in asked(path):
                look(whole.validate_python((await post(app, path, {**LEAST[path], **more})).json()), sent, added)
                if path == TEXT:  # its events have no type of their own
                    continue
                streamed = [*documents(await post(app, path, {**LEAST[path], **more, "stream": True}))]
                assert streamed
                for each in streamed:
                    look(event.validate_python(each), sent, added)
    unsent = {kind.__name__: sorted(set(kind.model_fields) - names) for kind, names in sent.items()}
    settle(lists["unsent"], {path: {name: left for name, left in sorted(unsent.items()) if left}})
    settle(lists["added"], {path: sorted(added)})


def test_a_new_member_would_be_seen() -> None:
    class Newer(ChatParams, total=False):  # type: ignore[misc]
        strange: Literal["odd", "odder"]

    sent = [body for body in members(Newer, ()) if "strange" in body]
    assert [body["strange"] for body in sent] == ["odd", "odder"]
