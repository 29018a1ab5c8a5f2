"""Every parameter of the `openai` package's own client, through the seal: gateway, worker, and two real models, one of which
embeds. With models this small: shape and validity, not wisdom.

The tables below are compared with the client's signatures: a parameter that a newer `openai` adds fails here until it is
supported or refused by name.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.resources.embeddings import Embeddings

import lacre
from parts.minilm import minilm, published
from parts.up import Up

pytestmark = pytest.mark.timeout(600)  # real models, on a machine that may be shared
CHAT_MODEL = "smollm2-135m"
MESSAGES: list[Any] = [{"role": "user", "content": "Name three seas."}]
TIDE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "The tide at a port",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"port": {"type": "string", "maxLength": 10}, "unit": {"enum": ["m", "ft"]}},
            "required": ["port", "unit"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
FACTS: dict[str, Any] = {
    "type": "object",
    "properties": {"sea": {"type": "string", "maxLength": 12}, "salty": {"type": "boolean"}},
    "required": ["sea", "salty"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "facts", "strict": True, "schema": FACTS}}
# The client's own, which never reach a server.
NOT_SENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A worker with a model that generates and one that embeds."""
    live = Up.start(tmp_path_factory.mktemp("both") / "state", "--model", CHAT_MODEL, "--model", str(minilm()))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def client(both: Up) -> Iterator[openai.OpenAI]:
    with lacre.Client(both.url, token=both.token, memory=lacre.VersionMemory()) as sealed:
        yield openai.OpenAI(http_client=sealed, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)


@pytest.fixture
async def async_client(both: Up) -> AsyncIterator[openai.AsyncOpenAI]:
    async with lacre.AsyncClient(both.url, token=both.token, memory=lacre.VersionMemory()) as sealed:
        yield openai.AsyncOpenAI(http_client=sealed, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)


@dataclass
class Choice:
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # id, name, arguments
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Got:
    """An answer, streamed or not."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Any = None

    @property
    def only(self) -> Choice:
        [choice] = self.choices.values()
        return choice

    def add(self, answer: Any) -> None:
        """A completion, or a chunk of one."""
        self.usage = answer.usage or self.usage
        for choice in answer.choices:
            mine = self.choices.setdefault(choice.index, Choice())
            mine.reason = choice.finish_reason or mine.reason
            if hasattr(choice, "text"):
                mine.text += choice.text
                mine.logprobs += choice.logprobs.tokens if choice.logprobs else []
                continue
            said = choice.delta if hasattr(choice, "delta") else choice.message
            mine.text += said.content or ""
            mine.logprobs += (choice.logprobs.content or []) if choice.logprobs else []
            for call in said.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    mine.calls.append([call.id, call.function.name, ""])
                mine.calls[-1][2] += call.function.arguments


Check = Callable[[Got], object]


def says_something(got: Got) -> None:
    assert got.choices and all(choice.text for choice in got.choices.values())
    assert all(choice.reason in ("stop", "length") for choice in got.choices.values())


def ends_at(limit: int) -> Check:
    def check(got: Got) -> None:
        assert got.only.reason == "length" and 0 < len(got.only.text) < 20 * limit

    return check


def two(got: Got) -> None:
    says_something(got)
    assert sorted(got.choices) == [0, 1]


def listed(alternatives: int) -> Check:
    def check(got: Got) -> None:
        assert 0 < len(got.only.logprobs) <= 8
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == alternatives for entry in got.only.logprobs)
        assert "".join(entry.token for entry in got.only.logprobs).strip() == got.only.text.strip()

    return check


def is_json(got: Got) -> None:
    assert isinstance(json.loads(got.only.text), dict)


def is_facts(got: Got) -> None:
    assert {name: type(value) for name, value in json.loads(got.only.text).items()} == {"sea": str, "salty": bool}


def calls_tide(got: Got) -> None:
    assert got.only.reason == "tool_calls"
    for call_id, name, arguments in got.only.calls:
        assert call_id.startswith("call_") and name == "get_tide"
        sent = json.loads(arguments)
        assert sent.keys() == {"port", "unit"} and sent["unit"] in ("m", "ft") and len(sent["port"]) <= 10


def calls_once(got: Got) -> None:
    calls_tide(got)
    assert len(got.only.calls) == 1


def speaks_or_calls(got: Got) -> None:
    assert got.only.text or got.only.calls


def no_calls(got: Got) -> None:
    says_something(got)
    assert not got.only.calls


def without_e(got: Got) -> None:
    says_something(got)
    assert "e" not in got.only.text


def spoke(fields: dict[str, Any], check: Check = says_something) -> tuple[dict[str, Any], Check]:
    return {"max_tokens": 8, **fields}, check


def tool_call(check: Check, **fields: Any) -> tuple[dict[str, Any], Check]:
    return {"tools": [TIDE], "max_tokens": 160, "seed": 3, **fields}, check


BY_NAME = {"type": "function", "function": {"name": "get_tide"}}
HISTORY: list[Any] = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [{**BY_NAME, "id": "c1"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "2 m"},
]
HISTORY[1]["tool_calls"][0]["function"] = {"name": "get_tide", "arguments": '{"port": "Porto", "unit": "m"}'}
BRIEF = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]

# Each parameter, with values that have an effect which can be seen.
CHAT: dict[str, list[tuple[dict[str, Any], Check]]] = {
    "messages": [
        spoke({}),
        spoke({"messages": BRIEF}),
        spoke({"messages": HISTORY}),
        spoke({"messages": HISTORY, "tools": [TIDE]}),
    ],
    "model": [spoke({})],
    "frequency_penalty": [spoke({"frequency_penalty": 1.5})],
    "presence_penalty": [spoke({"presence_penalty": -0.5})],
    "logit_bias": [spoke({"logit_bias": {"2": -100, "0": -100}}, ends_at(8))],  # no end of the turn
    "logprobs": [spoke({"logprobs": True}, listed(0))],
    "top_logprobs": [spoke({"logprobs": True, "top_logprobs": 3}, listed(3))],
    "max_completion_tokens": [({"max_completion_tokens": 3, "logit_bias": {"2": -100}}, ends_at(3))],
    "max_tokens": [({"max_tokens": 3, "logit_bias": {"2": -100}}, ends_at(3))],
    "n": [spoke({"n": 2}, two)],
    "response_format": [
        spoke({"response_format": {"type": "text"}}),
        ({"response_format": JSON_SCHEMA, "max_tokens": 120}, is_facts),
    ],
    "seed": [spoke({"seed": 5})],
    "stop": [
        spoke({"stop": ["e"], "seed": 1, "logit_bias": {"2": -100}, "max_tokens": 30}, without_e),
        spoke({"stop": "\x00"}),
    ],
    "stream": [spoke({})],
    "stream_options": [spoke({})],  # see `streamed`
    "temperature": [spoke({"temperature": 0}), spoke({"temperature": 1.7})],
    "top_p": [spoke({"top_p": 0.3})],
    "tools": [
        tool_call(calls_tide, tool_choice="required", parallel_tool_calls=False),
        tool_call(speaks_or_calls, max_tokens=20),
    ],
    "tool_choice": [
        tool_call(calls_once, tools=[TIDE, NOW], tool_choice=BY_NAME),
        tool_call(no_calls, tool_choice="none", max_tokens=8),
        tool_call(speaks_or_calls, tool_choice="auto", max_tokens=20),
    ],
    "parallel_tool_calls": [tool_call(calls_once, tool_choice="required", parallel_tool_calls=False)],
    # Taken, for no answer depends on them: whom they name, the SDK leaves outside the seal.
    "metadata": [spoke({"metadata": {"a": "b"}})],
    "user": [spoke({"user": "ana"})],
    "safety_identifier": [spoke({"safety_identifier": "s"})],
    "prompt_cache_key": [spoke({"prompt_cache_key": "k"})],
    "prompt_cache_retention": [spoke({"prompt_cache_retention": "24h"})],
    "store": [spoke({"store": False})],
    "modalities": [spoke({"modalities": ["text"]})],
    "service_tier": [spoke({"service_tier": "auto"})],
}
CHAT_REFUSED: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "ash"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "auto"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
}
TEXT: dict[str, list[tuple[dict[str, Any], Check]]] = {
    "prompt": [spoke({}), spoke({"prompt": ["The sea is"]})],
    "model": [spoke({})],
    "frequency_penalty": [spoke({"frequency_penalty": 1.0})],
    "presence_penalty": [spoke({"presence_penalty": 1.0})],
    "logit_bias": [spoke({"logit_bias": {"0": -100, "2": -100}}, ends_at(8))],
    "logprobs": [spoke({"logprobs": 2}, lambda got: got.only.logprobs or pytest.fail("none"))],
    "max_tokens": [({"max_tokens": 3, "logit_bias": {"0": -100, "2": -100}}, ends_at(3))],
    "n": [spoke({"n": 2}, two)],
    "seed": [spoke({"seed": 5})],
    "stop": [spoke({"stop": "\x00"})],
    "stream": [spoke({})],
    "stream_options": [spoke({})],
    "temperature": [spoke({"temperature": 0})],
    "top_p": [spoke({"top_p": 0.3})],
    "user": [spoke({"user": "ana"})],
    "best_of": [spoke({"best_of": 1})],
    "echo": [spoke({"echo": False})],
    "suffix": [spoke({"suffix": ""})],
}
TEXT_REFUSED: dict[str, Any] = {"best_of": 2, "echo": True, "suffix": "end"}
EMBED = {"input", "model", "dimensions", "encoding_format", "user"}
# Values of supported parameters that are refused.
ALSO_REFUSED: dict[str, Any] = {
    "modalities": ["text", "audio"], "service_tier": "flex", "store": True, "n": 17, "temperature": 3, "tool_choice": "maybe",
    "logprobs": 1, "stop": ["a"] * 5, "max_tokens": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("create", "known"),
    [
        (ChatCompletions.create, CHAT.keys() | CHAT_REFUSED.keys()),
        (Completions.create, TEXT.keys() | TEXT_REFUSED.keys()),
        (Embeddings.create, EMBED),
    ],
    ids=["chat", "text", "embeddings"],
)
def test_every_parameter_is_known_here(create: Any, known: set[str]) -> None:
    assert inspect.signature(create).parameters.keys() - NOT_SENT == known


def cases(table: dict[str, list[tuple[dict[str, Any], Check]]]) -> list[Any]:
    return [
        pytest.param(fields, check, id=f"{name}-{i}") for name, each in table.items() for i, (fields, check) in enumerate(each)
    ]


def used(got: Got) -> None:
    assert got.usage.prompt_tokens > 0 and got.usage.completion_tokens > 0
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def whole(create: Any, fields: dict[str, Any]) -> Got:
    got = Got()
    got.add(create(**fields))
    used(got)
    return got


async def streamed(create: Any, fields: dict[str, Any]) -> Got:
    got, chunks = Got(), 0
    async for chunk in await create(**fields, stream=True, stream_options={"include_usage": True}):
        got.add(chunk)
        chunks += 1
    assert chunks > 2
    used(got)
    return got


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "check"), cases(CHAT))
async def test_chat(client: openai.OpenAI, async_client: openai.AsyncOpenAI, fields: dict[str, Any], check: Check) -> None:
    asked = {"model": CHAT_MODEL, "messages": MESSAGES, **fields}
    check(whole(client.chat.completions.create, asked))
    check(await streamed(async_client.chat.completions.create, asked))


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "check"), cases(TEXT))
async def test_text(client: openai.OpenAI, async_client: openai.AsyncOpenAI, fields: dict[str, Any], check: Check) -> None:
    asked = {"model": CHAT_MODEL, "prompt": "The sea is", **fields}
    check(whole(client.completions.create, asked))
    check(await streamed(async_client.completions.create, asked))


@pytest.mark.slow
async def test_any_json_object(client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
    told: Any = client.post("/tokenize", cast_to=object, body={"model": CHAT_MODEL, "prompt": "{}"})
    asked = {
        "model": CHAT_MODEL, "messages": MESSAGES, "max_tokens": 20, "response_format": {"type": "json_object"},
        "logit_bias": {str(token): 100 for token in told["tokens"]},  # so small a model finds no end by itself
    }  # fmt: skip
    is_json(whole(client.chat.completions.create, asked))
    is_json(await streamed(async_client.chat.completions.create, asked))


async def test_the_other_two_ways(client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
    """Sync streamed, and async whole."""
    got = Got()
    for chunk in client.chat.completions.create(model=CHAT_MODEL, messages=MESSAGES, max_tokens=8, stream=True):
        got.add(chunk)
    says_something(got)
    again = Got()
    again.add(await async_client.chat.completions.create(model=CHAT_MODEL, messages=MESSAGES, max_tokens=8))
    says_something(again)


def test_what_other_servers_of_open_models_know_too(client: openai.OpenAI) -> None:
    begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": "The three seas are"}]
    for fields in ({"top_k": 5}, {"min_p": 0.1}, {"repeat_penalty": 1.1}):
        says_something(whole(client.chat.completions.create, {
            "model": CHAT_MODEL, "messages": MESSAGES, "max_tokens": 8, "extra_body": fields,
        }))  # fmt: skip
    says_something(whole(client.chat.completions.create, {
        "model": CHAT_MODEL, "messages": begun, "max_tokens": 8, "extra_body": {"continue_final_message": True},
    }))  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*CHAT_REFUSED.items(), *ALSO_REFUSED.items()])
def test_chat_refuses(client: openai.OpenAI, name: str, value: Any) -> None:
    fields: Any = {"tools": [TIDE]} if name == "tool_choice" else {}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=CHAT_MODEL, messages=MESSAGES, **fields, **{name: value})
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", name)
    assert name in caught.value.message


@pytest.mark.parametrize(("name", "value"), TEXT_REFUSED.items())
def test_text_refuses(client: openai.OpenAI, name: str, value: Any) -> None:
    fields: Any = {name: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=CHAT_MODEL, prompt="x", **fields)
    assert caught.value.param == name


@pytest.mark.slow
def test_a_parsed_message_goes_back(client: openai.OpenAI) -> None:
    """As `.parse` gives it: with `parsed`, `parsed_arguments`, and nulls."""
    given: Any = {"model": CHAT_MODEL, "tools": [TIDE], "max_tokens": 160, "temperature": 0}
    asked: list[Any] = [{"role": "user", "content": "How is the tide in Porto?"}]
    answer = client.chat.completions.parse(messages=asked, tool_choice="required", parallel_tool_calls=False, **given)
    message: Any = answer.choices[0].message
    [call] = message.tool_calls
    assert call.function.parsed_arguments.keys() == {"port", "unit"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "2 m"}
    for back in (message, message.model_dump()):
        after = client.chat.completions.create(messages=[*asked, back, result], **{**given, "max_tokens": 3})
        assert after.usage and after.usage.completion_tokens <= 3


class TestEmbeddings:
    @pytest.fixture
    def model(self) -> str:
        return minilm().stem.lower()

    @pytest.mark.parametrize(
        "fields", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 384}, {"user": "a"}]
    )
    def test_one(self, client: openai.OpenAI, model: str, fields: dict[str, Any]) -> None:
        text = "A cat sits on the mat."
        answer = client.embeddings.create(model=model, input=text, **fields)
        vector: Any = answer.data[0].embedding
        found = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
        assert found @ published().embed(published().ids(text)) > 0.999
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (9, 9, model)

    async def test_several(self, async_client: openai.AsyncOpenAI, model: str) -> None:
        texts = [f"Sea number {i}." for i in range(30)]
        ids = [published().ids(text) for text in texts]
        own: Any = {"own_token_ids": True}
        by_text = (await async_client.embeddings.create(model=model, input=texts)).data
        by_ids = (await async_client.embeddings.create(model=model, input=ids, extra_body=own)).data
        for i in (0, 29):
            assert by_text[i].index == by_ids[i].index == i
            assert np.array(by_text[i].embedding) @ published().embed(ids[i]) > 0.999
            assert np.array(by_text[i].embedding) @ np.array(by_ids[i].embedding) > 0.999

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"input": ""}, "input[0]"), ({"input": [15339, 1917]}, "input"), ({"dimensions": 8}, "dimensions"),
         ({"encoding_format": "int8"}, "encoding_format"), ({"model": CHAT_MODEL}, "model")],
    )  # fmt: skip
    def test_refuses(self, client: openai.OpenAI, model: str, fields: Any, param: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**{"model": model, "input": "x", **fields})
        assert caught.value.param == param


class TestModels:
    """With the token that `lacre up` writes: no scope is needed to look."""

    async def test_listed(self, client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
        names = {CHAT_MODEL, minilm().stem.lower()}
        assert {model.id for model in client.models.list()} == names
        assert {model.id async for model in async_client.models.list()} == names

    def test_one(self, client: openai.OpenAI) -> None:
        found = client.models.retrieve(CHAT_MODEL)
        assert (found.id, found.object, found.owned_by) == (CHAT_MODEL, "model", "lacre")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")

    def test_deleting_is_no_look(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            client.models.delete(CHAT_MODEL)
        assert refused.value.status_code == 405

    def test_tokenize(self, client: openai.OpenAI) -> None:
        for model in (CHAT_MODEL, minilm().stem.lower()):
            counted: Any = client.post("/tokenize", cast_to=object, body={"model": model, "prompt": "Two seas"})
            assert counted["count"] == len(counted["tokens"]) >= 2
