"""A second real model through the seal: gateway, worker and `lacre up`, with both vendors' SDKs. Properties, never texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

import lacre
from parts.gemma import WINDOW, gemma
from parts.up import Up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LOG = "".join(f"On day {day} the harbour master counted {3 * day + 1} ships, and wrote that down. " for day in range(60))
TIDE: dict[str, Any] = {
    "type": "object",
    "properties": {"port": {"enum": ["Porto", "Faro"]}},
    "required": ["port"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up.start(tmp_path_factory.mktemp("gemma") / "state", "--model", str(gemma()), as_shipped=False) as up:
        yield up


@pytest.fixture(scope="module")
def client(up: Up) -> Iterator[lacre.Client]:
    with up.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(client: lacre.Client) -> str:
    [model] = [each.id for each in vendor(client).models.list()]
    return model


def vendor(client: lacre.Client) -> openai.OpenAI:
    return openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)


def test_a_turn_longer_than_the_window(client: lacre.Client, model: str) -> None:
    asked: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LOG + "How many on day 3?"}]
    first, again = (vendor(client).chat.completions.create(messages=asked, model=model, max_tokens=6) for _ in range(2))
    assert first.usage is not None and again.usage is not None
    assert first.usage.prompt_tokens == again.usage.prompt_tokens > 2 * WINDOW
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > WINDOW


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_chat_calls_a_tool(client: lacre.Client, model: str, stream: bool) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "High tide in Porto?"}],
        "tools": [{"type": "function", "function": {"name": "tide", "parameters": TIDE}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "model": model,
    }
    if stream:
        with vendor(client).chat.completions.stream(**asked) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = vendor(client).chat.completions.create(**asked).choices[0].message
    [call] = message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)["port"] in ("Porto", "Faro")) == ("tide", True)


def test_a_response_and_a_message_call_a_tool(client: lacre.Client, model: str) -> None:
    tool: Any = {"type": "function", "name": "tide", "parameters": TIDE, "strict": False}
    response = vendor(client).responses.create(
        model=model, input="High tide in Faro?", tools=[tool], tool_choice="required", store=False, parallel_tool_calls=False
    )
    [called] = [item for item in response.output if item.type == "function_call"]
    assert json.loads(called.arguments)["port"] in ("Porto", "Faro")
    sealed = anthropic.Anthropic(http_client=client, base_url=lacre.ORIGIN, api_key="sealed", max_retries=0)
    message = sealed.messages.create(
        model=model,
        max_tokens=100,
        messages=[{"role": "user", "content": "High tide in Faro?"}],
        tools=[{"name": "tide", "input_schema": TIDE}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    [block] = message.content
    assert block.type == "tool_use" and block.name == "tide"


def test_it_takes_no_images(client: lacre.Client, model: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlhAQABAAAAADs="}}
    asked: Any = [{"role": "user", "content": [image]}]
    with pytest.raises(openai.BadRequestError, match=f"The model `{model}` takes no images"):
        vendor(client).chat.completions.create(messages=asked, model=model)
