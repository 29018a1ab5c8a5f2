"""`kill -9` of the worker in the middle of an answer that calls functions, thirty times: each call comes whole, and once."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.parts import Argued, Called
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models import gguf
from parts.stage import MODEL, LiveStage, busiest

KILLS = 30
LIMIT = 110  # tokens of an answer: three calls or more
SUBJECTS = ("the sea", "a lighthouse", "two brothers", "a long road", "winter", "the moon")
SCHEMA = {
    "type": "object", "required": ["name", "depths"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "depths": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
}  # fmt: skip
Call = tuple[str, str, str]  # id, name, arguments
Documents = list[dict[str, Any]]


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[LiveStage]:
    async with LiveStage.on_air(tmp_path, workers=2) as pool:
        yield pool


def chat(said: str) -> dict[str, Any]:
    function = {"name": "chart", "parameters": SCHEMA, "strict": True}
    return {
        "messages": [{"role": "user", "content": said}], "tools": [{"type": "function", "function": function}],
        "tool_choice": "required", "max_tokens": LIMIT, "stream_options": {"include_usage": True},
    }  # fmt: skip


def response(said: str) -> dict[str, Any]:
    tools = [{"type": "function", "name": "chart", "parameters": SCHEMA, "strict": True}]
    return {"input": said, "tools": tools, "tool_choice": "required", "max_output_tokens": LIMIT}


def message(said: str) -> dict[str, Any]:
    tools = [{"name": "chart", "input_schema": SCHEMA, "strict": True}]
    asked = [{"role": "user", "content": said}]
    return {"messages": asked, "tools": tools, "tool_choice": {"type": "any"}, "max_tokens": LIMIT}


def chats_calls(events: Documents) -> list[Call]:
    """Checks a chat's chunks, and returns its calls."""
    ends = [choice["finish_reason"] for chunk in events for choice in chunk["choices"] if choice["finish_reason"]]
    roles = [choice for chunk in events for choice in chunk["choices"] if "role" in choice["delta"]]
    assert (len(ends), len(roles), len({chunk["id"] for chunk in events})) == (1, 1, 1)
    assert ends[0] in ("tool_calls", "length")
    calls: list[list[str]] = []
    for each in (call for chunk in events for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())):
        if "id" in each:
            assert each["index"] == len(calls)
            calls.append([each["id"], each["function"]["name"]])
        else:
            calls[each["index"]].append(each["function"]["arguments"])
    return [(name, function, "".join(pieces)) for name, function, *pieces in calls]


def responses_calls(events: Documents) -> list[Call]:
    """The last event has the whole response, which the second worker wrote: it says what the events of both said."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    whole = events[-1]["response"]
    assert whole["id"] == events[0]["response"]["id"] and whole["created_at"] == events[0]["response"]["created_at"]
    calls: list[Call] = []
    for index, item in enumerate(whole["output"]):
        [added] = [e for e in events if e["type"] == "response.output_item.added" and e["output_index"] == index]
        [done] = [e for e in events if e["type"] == "response.output_item.done" and e["output_index"] == index]
        deltas = [e for e in events if e["type"] == "response.function_call_arguments.delta" and e["output_index"] == index]
        assert done["item"] == item and (added["item"]["id"], added["item"]["call_id"]) == (item["id"], item["call_id"])
        assert "".join(each["delta"] for each in deltas) == item["arguments"]
        assert {each["item_id"] for each in deltas} <= {item["id"]}
        calls.append((item["call_id"], item["name"], item["arguments"]))
    return calls


def messages_calls(events: Documents) -> list[Call]:
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert events[-2]["delta"]["stop_reason"] in ("tool_use", "max_tokens")
    calls: list[Call] = []
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(calls)
            calls.append((event["content_block"]["id"], event["content_block"]["name"], ""))
        elif event["type"] == "content_block_delta":
            *before, (name, function, said) = calls
            assert event["index"] == len(before)
            calls = [*before, (name, function, said + event["delta"]["partial_json"])]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(calls)
    return calls


APIS: list[tuple[str, Callable[[str], dict[str, Any]], Callable[[Documents], list[Call]]]] = [
    ("/v1/chat/completions", chat, chats_calls),
    ("/v1/responses", response, responses_calls),
    ("/v1/messages", message, messages_calls),
]


class Vocabulary:
    """The model's, in this process: what the tokens that a client received say."""

    def __init__(self) -> None:
        file = gguf.find()
        with closing(Tokenizer(file.path)) as tokenizer:
            self._model = Model(
                file.path, name=file.name, digest=file.digest, n_ctx=512, gpu=Gpu(layers=0), tokenizer=tokenizer
            )

    def calls(self, tokens: list[int]) -> list[tuple[str, str]]:
        reader = CallReader(HERMES, ["chart"], "seed")
        parts = [part for text in self._model.released(tokens, ()) for part in reader.push(text)]
        named = [part.name for part in parts if isinstance(part, Called)]
        return [
            (name, "".join(part.text for part in parts if isinstance(part, Argued) and part.index == index))
            for index, name in enumerate(named)
        ]


async def one(
    pool: LiveStage, client: lacre.AsyncClient, path: str, body: dict[str, Any], place: int
) -> tuple[Any, Any, float]:
    """An answer whose worker is killed after so many events: its facts, its events, and the longest pause between two."""
    before = [worker.ticks for worker in pool.workers]
    found: Documents = []
    pause, last = 0.0, None
    async with client.stream("POST", path, json={"model": MODEL, "temperature": 0, "stream": True, **body}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for event in httpx2.EventSource(answer):
            now = time.monotonic()
            pause, last = max(pause, now - (last or now)), now
            if event.data != "[DONE]":
                found.append(json.loads(event.data))
            if len(found) == place:
                victim = busiest(pool.workers, before)
                victim.kill()
                victim.start()
        return answer.extensions["lacre"], found, pause


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_kill_9_within_calls(pool: LiveStage, record_property: Any) -> None:
    chance, vocabulary = random.Random(21), Vocabulary()
    pauses, seams, calls_of, inside = [], [], [], 0
    async with lacre.AsyncClient(pool.gateways[0].url, token=pool.site.token("jo"), memory=lacre.VersionMemory()) as client:
        for number in range(KILLS):
            path, body, read = APIS[number % len(APIS)]
            said = f"Chart {SUBJECTS[number % 6]}, number {number}: call the function once for each place."
            await pool.heard()
            facts, events, pause = await one(pool, client, path, body(said), chance.randrange(4, 50))
            assert len(facts.parts) == 1, f"answer {number} was not cut"
            calls = read(events)
            assert [(name, arguments) for _, name, arguments in calls] == vocabulary.calls(facts.tokens)
            assert len({call for call, _, _ in calls}) == len(calls) > 0
            for _, name, arguments in calls[:-1]:
                assert name == "chart" and 1 <= len(json.loads(arguments)["depths"]) <= 3
            seam = vocabulary.calls(facts.tokens[: facts.parts[0].completion])
            inside += bool(seam) and seam[-1][1] != calls[len(seam) - 1][2]
            pauses.append(pause)
            seams.append(facts.parts[0].completion)
            calls_of.append(len(calls))
    report = {
        "completed": len(pauses), "pause_median_s": statistics.median(pauses), "pause_max_s": max(pauses),
        "calls": sum(calls_of), "cut_inside_arguments": inside, "seams": f"{min(seams)}..{max(seams)}",
    }  # fmt: skip
    record_property("resume_calls", report)
    print(report)
    assert len(pauses) == KILLS
    assert inside > KILLS // 4
