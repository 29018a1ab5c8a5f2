"""llama.cpp's own `llama-server`, compiled here, behind a worker: sealed chats stream through it, counted as it counts."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

import lacre
from heavy.llama_server.build import LIBRARIES, llama_server
from lacre_backend.models.gguf import default_path
from lacre_fabric.operate.nats_server import free_port
from parts.memory import found_in_memory
from parts.platforms import Served, behind, canary, documented, on_the_way, served
from parts.stage import MODEL, LiveStage, until

# The first one compiles the server: minutes, if the machine is busy.
pytestmark = pytest.mark.timeout(1800)

CHAT: Final = "/v1/chat/completions"
GREEDY: Final[dict[str, Any]] = {"max_tokens": 40, "temperature": 0}
LINE: Final = re.compile(r"^llamacpp:(prompt_tokens|tokens_predicted)_total (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Place:
    live: LiveStage
    server: Served

    def client(self) -> lacre.AsyncClient:
        return self.live.client(self.live.token("mallory"))

    async def direct(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Asked of the server itself, in the clear."""
        async with httpx2.AsyncClient(base_url=self.server.url, trust_env=False, timeout=60) as client:
            return (await client.request(method, path, **options)).raise_for_status()

    async def counted(self) -> dict[str, int]:
        """The tokens that the server has read and written since it started, by its own metrics."""
        return {name: int(number) for name, number in LINE.findall((await self.direct("GET", "/metrics")).text)}


@pytest.fixture(scope="module")
async def place(llama_cpp_source: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder, port = tmp_path_factory.mktemp("llama-server"), free_port()
    binary = llama_server(llama_cpp_source)
    where = ["--host", "127.0.0.1", "--port", str(port), "--model", default_path()]
    size = ["--ctx-size", "2048", "--parallel", "1", "--threads", "1", "--metrics"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES)}
    with served([binary, *where, *size], port, folder / "server.log", env) as server:
        await server.answers("/health")
        upstream = documented("llama.cpp's server")["toml"].replace("http://127.0.0.1:8080", server.url)
        async with behind(folder, {MODEL: upstream}) as live:
            yield Place(live, server)


async def test_a_sealed_chat_streams_and_stays_secret(place: Place) -> None:
    """Watched while it streams: the gateway's memory has neither the question nor what was answered so far."""
    word = canary()
    pids = {**on_the_way(place.live), "server": place.server.process.pid}
    seen: dict[str, set[str]] = {name: set() for name in pids}
    stream, pieces = place.client().chat_stream(f"Tell a long story about the ship {word}.", model=MODEL, max_tokens=120), []
    async for piece in stream:
        pieces.append(piece)
        if len(pieces) in {10, 60}:
            needles = {"asked": word.encode(), "answered": "".join(pieces)[-20:].encode()}
            for name, pid in pids.items():
                seen[name] |= await asyncio.to_thread(found_in_memory, pid, needles)
    assert len(pieces) > 60
    assert seen["gateway"] == seen["nats"] == set()
    assert "asked" in seen["worker"]
    assert seen["server"] == {"asked", "answered"}
    assert not found_in_memory(pids["gateway"], {"asked": word.encode(), "answered": "".join(pieces)[20:60].encode()})


async def test_tokens_are_counted_as_the_server_counts(place: Place) -> None:
    before = await place.counted()
    stream = place.client().chat_stream("Count from one to twenty.", model=MODEL, **GREEDY)
    assert "".join([piece async for piece in stream])
    after = await place.counted()
    own = {name: after[name] - before[name] for name in before}
    assert own["tokens_predicted"] == stream.usage.completion > 10
    assert own["prompt_tokens"] == stream.usage.prompt > 10
    receipt = stream.receipt
    assert receipt is not None
    told = (receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens)
    assert told == (stream.usage.prompt, 0, stream.usage.completion)

    def audited() -> bool:
        """It is settled beside the request."""
        entries = place.live.entries("outcome")
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return bool(entries) and tuple(entries[-1][name] for name in names) == told

    await until(audited, 10, lambda: place.live.entries("outcome")[-1:])


async def test_the_text_is_what_the_server_writes(place: Place) -> None:
    """With `cache_prompt = false`, asking it again gives the same text, sealed or not."""
    messages = [{"role": "user", "content": "Name three fish."}]
    body = {"messages": messages, "cache_prompt": False, **GREEDY}
    plain = (await place.direct("POST", CHAT, json=body)).json()
    reply = await place.client().chat(messages, model=MODEL, **GREEDY)
    assert reply.text == plain["choices"][0]["message"]["content"] != ""
    assert (reply.usage.prompt, reply.usage.completion) == (
        plain["usage"]["prompt_tokens"],
        plain["usage"]["completion_tokens"],
    )


async def test_its_other_paths_and_members_stay_out_of_reach(place: Place) -> None:
    client = place.live.client(place.live.token("mallory", scopes=["lacre:http"]))
    for path in ("/slots", "/props", "/metrics"):
        response = await client.get(path, headers={"lacre-model": MODEL})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "n_predict": 500}
    response = await client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")
