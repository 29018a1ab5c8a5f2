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

import anthropic
import numpy as np
import openai
import pytest
from anthropic.types import ToolUseBlock
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.resources.embeddings import Embeddings
from openai.types.responses import ResponseFunctionToolCall

import lacre
from parts.both import serving_both
from parts.minilm import NAME, published
from parts.up import Up

pytestmark = pytest.mark.timeout(600)  # real models, on a machine that may be shared
CHAT_MODEL = "smollm2-135m"
MESSAGES: list[Any] = [{"role": "user", "content": "Name three seas."}]
UNIT = {"port": {"type": "string", "maxLength": 10}, "unit": {"enum": ["m", "ft"]}}
SALT = {"sea": {"type": "string", "maxLength": 12}, "salty": {"type": "boolean"}}


def object_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


TIDE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_tide", "description": "The tide", "strict": True, "parameters": object_of(UNIT)},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "facts", "strict": True, "schema": object_of(SALT)}}
# The client's own, which never reach a server.
NOT_SENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with serving_both(tmp_path_factory.mktemp("both")) as live:
        yield live


@pytest.fixture(scope="module")
def client(both: Up) -> Iterator[openai.OpenAI]:
    with both.client() as sealed:
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


def lists(got: Got) -> None:
    assert got.only.logprobs


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


BY_NAME = {"type": "function", "function": {"name": "get_tide"}}
HISTORY: list[Any] = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [{**BY_NAME, "id": "c1"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "2 m"},
]
HISTORY[1]["tool_calls"][0]["function"] = {"name": "get_tide", "arguments": '{"port": "Porto", "unit": "m"}'}
BEGUN = [*MESSAGES, {"role": "assistant", "content": "The three seas are"}]
BRIEF = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]

NO_END = {"2": -100, "0": -100}  # of the turn
CALLS = {"tools": [TIDE], "max_tokens": 160, "seed": 3}
# Values with which the model speaks as without them, or so that nobody can tell.
SPEAKS: dict[str, dict[str, list[Any]]] = {
    "chat": {
        "messages": [MESSAGES, BRIEF, HISTORY], "frequency_penalty": [1.5], "presence_penalty": [-0.5], "seed": [5],
        "response_format": [{"type": "text"}], "stop": ["\x00"], "temperature": [0, 1.7], "top_p": [0.3],
        # Taken, for no answer depends on them: whom they name, the SDK leaves outside the seal.
        "metadata": [{"a": "b"}], "user": ["ana"], "safety_identifier": ["s"], "prompt_cache_key": ["k"],
        "prompt_cache_retention": ["24h"], "store": [False], "modalities": [["text"]],
        "service_tier": ["auto"], "verbosity": ["medium"],
        "reasoning_effort": ["low", "none"],  # a wish, which this model's template does not know
    },
    "text": {
        "prompt": ["The sea is", ["The sea is"]], "frequency_penalty": [1.0], "presence_penalty": [1.0], "seed": [5],
        "stop": ["\x00"], "temperature": [0], "top_p": [0.3], "user": ["ana"], "best_of": [1], "echo": [False], "suffix": [""],
    },
}  # fmt: skip
# What has an effect that can be seen.
EFFECTS: dict[str, list[tuple[str, dict[str, Any], Check]]] = {
    "chat": [
        ("messages", {"messages": HISTORY, "tools": [TIDE], "tool_choice": "none", "logit_bias": NO_END}, says_something),
        ("logit_bias", {"logit_bias": NO_END}, ends_at(8)),
        ("logprobs", {"logprobs": True}, listed(0)),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 3}, listed(3)),
        ("max_completion_tokens", {"max_tokens": openai.omit, "max_completion_tokens": 3, "logit_bias": NO_END}, ends_at(3)),
        ("max_tokens", {"max_tokens": 3, "logit_bias": NO_END}, ends_at(3)),
        ("n", {"n": 2}, two),
        ("response_format", {"response_format": JSON_SCHEMA, "max_tokens": 120}, is_facts),
        ("stop", {"stop": ["e"], "seed": 1, "logit_bias": NO_END, "max_tokens": 30}, without_e),
        ("tools", {**CALLS, "tool_choice": "required", "parallel_tool_calls": False}, calls_tide),
        ("tools", {**CALLS, "max_tokens": 20}, speaks_or_calls),
        ("tool_choice", {**CALLS, "tools": [TIDE, NOW], "tool_choice": BY_NAME}, calls_once),
        ("tool_choice", {**CALLS, "tool_choice": "none", "max_tokens": 8}, no_calls),
        ("tool_choice", {**CALLS, "tool_choice": "auto", "max_tokens": 20}, speaks_or_calls),
        ("parallel_tool_calls", {**CALLS, "tool_choice": "required", "parallel_tool_calls": False}, calls_once),
    ],
    "text": [
        ("logit_bias", {"logit_bias": NO_END}, ends_at(8)),
        ("logprobs", {"logprobs": 2}, lists),
        ("max_tokens", {"max_tokens": 3, "logit_bias": NO_END}, ends_at(3)),
        ("n", {"n": 2}, two),
    ],
}
REFUSED: dict[str, dict[str, list[Any]]] = {
    "chat": {
        "audio": [{"format": "wav", "voice": "ash"}], "function_call": [{"name": "f"}], "functions": [[{"name": "f"}]],
        "moderation": [{"model": "m"}], "prediction": [{"type": "content", "content": "x"}],
        "prompt_cache_options": [{"mode": "auto"}], "verbosity": ["low"],
        "web_search_options": [{}],
        # Values of supported ones.
        "modalities": [["text", "audio"]], "service_tier": ["flex"], "store": [True], "n": [17], "temperature": [3],
        "tool_choice": ["maybe"], "logprobs": [1], "stop": [["a"] * 17], "max_tokens": [0],
    },
    "text": {"best_of": [2], "echo": [True], "suffix": ["end"]},
}  # fmt: skip
EVERYWHERE = {"model", "stream", "stream_options"}
EMBED = {"input", "model", "dimensions", "encoding_format", "user"}


def known(api: str) -> set[str]:
    return EVERYWHERE | SPEAKS[api].keys() | REFUSED[api].keys() | {name for name, _, _ in EFFECTS[api]}


def rows(table: dict[str, dict[str, list[Any]]]) -> list[tuple[str, str, Any]]:
    """Each value of each parameter."""
    return [(api, name, value) for api, named in table.items() for name, values in named.items() for value in values]


ANSWERS = [(api, name, {name: value}, says_something) for api, name, value in rows(SPEAKS)]
ANSWERS += [(api, *effect) for api, effects in EFFECTS.items() for effect in effects]


@pytest.mark.parametrize(
    ("create", "known"),
    [
        (ChatCompletions.create, known("chat")),
        (Completions.create, known("text")),
        (Embeddings.create, EMBED),
    ],
    ids=["chat", "text", "embeddings"],
)
def test_every_parameter_is_known_here(create: Any, known: set[str]) -> None:
    assert inspect.signature(create).parameters.keys() - NOT_SENT == known


def used(got: Got) -> None:
    assert got.usage.prompt_tokens > 0 and got.usage.completion_tokens > 0
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def asked(client: Any, api: str, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What creates an answer, and with what."""
    usual = {"model": CHAT_MODEL, "max_tokens": 8, **({"messages": MESSAGES} if api == "chat" else {"prompt": "The sea is"})}
    return (client.chat.completions if api == "chat" else client.completions).create, {**usual, **fields}


def whole(client: openai.OpenAI, api: str, fields: dict[str, Any]) -> Got:
    got = Got()
    create, fields = asked(client, api, fields)
    got.add(create(**fields))
    used(got)
    return got


async def streamed(client: openai.AsyncOpenAI, api: str, fields: dict[str, Any]) -> Got:
    got, chunks = Got(), 0
    create, fields = asked(client, api, fields)
    async for chunk in await create(**fields, stream=True, stream_options={"include_usage": True}):
        got.add(chunk)
        chunks += 1
    assert chunks > 2
    used(got)
    return got


@pytest.mark.slow
@pytest.mark.parametrize(("api", "name", "fields", "check"), ANSWERS)
async def test_an_answer(
    client: openai.OpenAI, async_client: openai.AsyncOpenAI, api: str, name: str, fields: dict[str, Any], check: Check
) -> None:
    """name: the parameter that the row is about."""
    check(whole(client, api, fields))
    check(await streamed(async_client, api, fields))


@pytest.mark.slow
async def test_any_json_object(client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
    told: Any = client.post("/tokenize", cast_to=object, body={"model": CHAT_MODEL, "prompt": "{}"})
    # So small a model finds no end by itself.
    likely = {str(token): 100 for token in told["tokens"]}
    fields = {"max_tokens": 20, "response_format": {"type": "json_object"}, "logit_bias": likely}
    is_json(whole(client, "chat", fields))
    is_json(await streamed(async_client, "chat", fields))


async def test_the_other_two_ways(client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
    """Sync streamed, and async whole."""
    got, again = Got(), Got()
    create, fields = asked(client, "chat", {})
    for chunk in create(**fields, stream=True):
        got.add(chunk)
    create, fields = asked(async_client, "chat", {})
    again.add(await create(**fields))
    says_something(got)
    says_something(again)


@pytest.mark.parametrize(
    "body", [{"top_k": 5}, {"min_p": 0.1}, {"repeat_penalty": 1.1}, {"continue_final_message": True, "messages": BEGUN}]
)
def test_what_other_servers_of_open_models_know_too(client: openai.OpenAI, body: dict[str, Any]) -> None:
    says_something(whole(client, "chat", {"extra_body": body}))


@pytest.mark.parametrize(("api", "name", "value"), rows(REFUSED))
def test_refuses(client: openai.OpenAI, api: str, name: str, value: Any) -> None:
    create, fields = asked(client, api, {name: value} | ({"tools": [TIDE]} if name == "tool_choice" else {}))
    with pytest.raises(openai.BadRequestError) as caught:
        create(**fields)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", name)
    assert name in caught.value.message


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
    @pytest.mark.parametrize(
        "fields", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 384}, {"user": "a"}]
    )
    def test_one(self, client: openai.OpenAI, fields: dict[str, Any]) -> None:
        text = "A cat sits on the mat."
        answer = client.embeddings.create(model=NAME, input=text, **fields)
        vector: Any = answer.data[0].embedding
        found = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
        assert found @ published().embed(published().ids(text)) > 0.999
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (9, 9, NAME)

    async def test_several(self, async_client: openai.AsyncOpenAI) -> None:
        texts = [f"Sea number {i}." for i in range(30)]
        ids = [published().ids(text) for text in texts]
        own: Any = {"own_token_ids": True}
        by_text = (await async_client.embeddings.create(model=NAME, input=texts)).data
        by_ids = (await async_client.embeddings.create(model=NAME, input=ids, extra_body=own)).data
        for i in (0, 29):
            assert by_text[i].index == by_ids[i].index == i
            assert np.array(by_text[i].embedding) @ published().embed(ids[i]) > 0.999
            assert np.array(by_text[i].embedding) @ np.array(by_ids[i].embedding) > 0.999


class TestModels:
    """With the token that `lacre up` writes: no scope is needed to look."""

    async def test_listed(self, client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
        names = {CHAT_MODEL, NAME}
        assert {model.id for model in client.models.list()} == names
        assert {model.id async for model in async_client.models.list()} == names

    def test_one(self, client: openai.OpenAI) -> None:
        found = client.models.retrieve(CHAT_MODEL)
        assert (found.id, found.object, found.owned_by) == (CHAT_MODEL, "model", "lacre")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")
        with pytest.raises(openai.APIStatusError, match="405"):
            client.models.delete(CHAT_MODEL)

    @pytest.mark.parametrize("model", [CHAT_MODEL, NAME])
    def test_tokenize(self, client: openai.OpenAI, model: str) -> None:
        counted: Any = client.post("/tokenize", cast_to=object, body={"model": model, "prompt": "Two seas"})
        assert counted["count"] == len(counted["tokens"]) >= 2


class TestOtherFaces:
    """The same generation by `/v1/responses` and by Anthropic's `/v1/messages`."""

    def test_a_response(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": CHAT_MODEL, "input": MESSAGES, "max_output_tokens": 8, "store": False, "temperature": 0}
        answer = client.responses.create(**asked)
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        assert answer.status == events[-1].response.status == "incomplete"
        assert answer.usage is not None
        assert answer.usage.output_tokens == events[-1].response.usage.output_tokens == 8
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == events[-1].response.output_text != ""

    def test_a_response_of_a_schema_and_of_a_call(self, client: openai.OpenAI) -> None:
        form = {"type": "json_schema", "name": "facts", "strict": True, "schema": object_of(SALT)}
        asked: Any = {"model": CHAT_MODEL, "input": "A sea?", "max_output_tokens": 100, "text": {"format": form}}
        assert set(json.loads(client.responses.create(**asked).output_text)) == {*SALT}
        tool = {"type": "function", **TIDE["function"]}
        asked = {"model": CHAT_MODEL, "input": "Tide?", "tools": [tool], "tool_choice": "required"}
        [called, *_] = client.responses.create(**asked).output
        assert isinstance(called, ResponseFunctionToolCall)
        assert (called.name, set(json.loads(called.arguments))) == ("get_tide", {*UNIT})

    def test_a_message(self, both: Up) -> None:
        tool = {"name": "get_tide", "input_schema": object_of(UNIT)}
        said: Any = {"model": CHAT_MODEL, "messages": MESSAGES, "system": "Be brief.", "max_tokens": 8}
        said["extra_body"] = {"temperature": 0}  # drawn at random, one in thirty is shorter
        with both.client() as sealed:
            client = anthropic.Anthropic(http_client=sealed, base_url=lacre.ORIGIN, api_key="sealed", max_retries=0)
            answer = client.messages.create(**said)
            with client.messages.stream(**said) as stream:
                streamed = stream.get_final_message()
            called = client.messages.create(
                **{**said, "max_tokens": 100}, tools=[tool], tool_choice={"type": "tool", "name": "get_tide"}
            )
            counted = client.messages.count_tokens(model=CHAT_MODEL, messages=MESSAGES, system="Be brief.")
            with pytest.raises(anthropic.NotFoundError):
                client.messages.create(**{**said, "model": "none"})
        assert answer.stop_reason == streamed.stop_reason == "max_tokens"
        assert answer.usage.output_tokens == streamed.usage.output_tokens == 8
        read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
        assert counted.input_tokens == read
        [block] = called.content
        assert isinstance(block, ToolUseBlock)
        assert (block.name, set(block.input), called.stop_reason) == ("get_tide", {*UNIT}, "tool_use")
