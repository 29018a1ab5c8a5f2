"""Structured answers: a type or a JSON schema goes in, an instance comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pydantic
import pytest

import lacre
from lacre.asgi import EXTENSION
from parts.chat_app import reply
from parts.relay import Relay, connect

SECRET = "Tethys"


class Sea(pydantic.BaseModel):
    name: str
    depth: int = 0


class Atlas(pydantic.BaseModel):
    seas: list[Sea]
    title: str = "An atlas"


class Answering:
    """An app that answers with one text, whole or as a stream, and keeps what it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: dict[str, Any] = {}

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        self.asked = json.loads((await receive())["body"])
        scope["extensions"][EXTENSION].usage.model_digest = "sha256:77"
        said = {"role": "assistant", "content": self.text}
        head = {"id": "c1", "model": "tiny"}
        if not self.asked.get("stream"):
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            return await reply(send, 200, {**head, "choices": [{"message": said}], "usage": usage})
        event = json.dumps({**head, "choices": [{"delta": said, "finish_reason": "stop"}]})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": f"data: {event}\n\ndata: [DONE]\n\n".encode()})


def test_a_type_in_and_an_instance_out() -> None:
    app = Answering('{"seas":[{"name":"Tethys","depth":4}]}')
    with connect(Relay(app)) as client:
        told = client.chat("x", schema=Atlas)
        assert told.parsed(Atlas) == Atlas(seas=[Sea(name=SECRET, depth=4)])
        assert told.parsed() == told.choices[0].parsed() == told.parsed(Atlas)
        stream = client.chat_stream("x", schema=Atlas)
        assert stream.reply().parsed() == stream.choices[0].parsed() == told.parsed(Atlas)
        wanted = app.asked["response_format"]
        plain = client.chat("x")
        assert plain.parsed() == {"seas": [{"name": SECRET, "depth": 4}]} and plain.parsed(Atlas) == told.parsed()
    assert (wanted["type"], wanted["json_schema"]["name"], wanted["json_schema"]["strict"]) == ("json_schema", "Atlas", True)
    schema = wanted["json_schema"]["schema"]
    assert schema["additionalProperties"] is schema["$defs"]["Sea"]["additionalProperties"] is False


def test_a_json_schema_goes_as_it_is() -> None:
    app, schema = Answering("[1, 2]"), {"type": "array", "items": {"type": "integer"}}
    with connect(Relay(app)) as client:
        told = client.chat("x", schema=schema)
    assert app.asked["response_format"]["json_schema"]["schema"] == schema
    assert told.parsed() == told.parsed(list[int]) == [1, 2]


@pytest.mark.parametrize("text", ['{"name":"Tethys","dep', '{"name":["Tethys"]}', "Tethys"])
def test_an_answer_that_does_not_fit_shows_nothing_of_itself(text: str) -> None:
    with connect(Relay(Answering(text))) as client:
        told = client.chat("x")
    with pytest.raises(lacre.InvalidMessage) as caught:
        told.parsed(Sea)
    assert "Sea" in str(caught.value) and "Allow more tokens" in caught.value.remedy
    assert SECRET not in f"{caught.value!r}{caught.value}" and caught.value.__cause__ is None
    if text[0] != "{" or text[-1] != "}":
        with pytest.raises(lacre.InvalidMessage, match="not JSON"):
            told.parsed()


@pytest.mark.parametrize("schema", [5, "Sea", object(), lambda: 5, type], ids=["int", "str", "object", "function", "type"])
def test_what_is_no_schema(schema: Any) -> None:
    app = Answering("1")
    with connect(Relay(app)) as client, pytest.raises(lacre.UsageError, match="schema"):
        client.chat("x", schema=schema)
    with connect(Relay(app)) as client, pytest.raises(lacre.UsageError, match="both"):
        client.chat("x", schema=Sea, response_format={"type": "json_object"})
    assert not app.asked


def test_pydantic_is_imported_for_types_alone() -> None:
    code = """
import sys
sys.modules["pydantic"] = None
from lacre.chat import structured
from lacre.errors import UsageError
assert structured.format_of({"type": "object"})["json_schema"]["schema"] == {"type": "object"}
assert structured.read("[1]", None) == [1]
try:
    structured.format_of(int)
except UsageError as error:
    assert "pip install pydantic" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
