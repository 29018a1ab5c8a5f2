"""What a type checker knows of the public API: mypy and Pyright must both accept this file, strictly. Nothing runs it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, assert_type

import httpx
import httpx2
import openai
import pydantic

import lacre
import lacre.legacy
from lacre.asgi import Sealed, key_file
from lacre.wire.opening import PrivateKey


def sync_client() -> None:
    with lacre.Client("lacre://host?trust=x", token=lambda: "t", pool="p", timeout=3.0) as client:
        assert_type(client, lacre.Client)
        reply = client.chat("x", max_tokens=3)
        assert_type(reply, lacre.Reply)
        assert_type(reply.text, str)
        assert_type(reply.usage, lacre.TokenUsage)
        assert_type(reply.receipt, lacre.Receipt)
        assert_type(reply.recount(len), lacre.Recount)
        assert_type(reply.finish_reason, str | None)
        assert_type(reply.tool_calls, tuple[lacre.ToolCall, ...])
        assert_type(reply.choices[0].logprobs, tuple[lacre.TokenLogprob, ...] | None)
        client.chat([{"role": "user", "content": "x"}, reply.message], timeout=3, extra_body={"seed": 1}, tools=[])
        stream = client.chat_stream([{"role": "user", "content": "x"}])
        assert_type(stream, lacre.ChatStream)
        for piece in stream:
            assert_type(piece, str)
        assert_type(stream.usage, lacre.TokenUsage | None)
        assert_type(stream.reply(), lacre.Reply)
        for event in client.chat_stream("x", n=2).events():
            if isinstance(event, lacre.ToolCallDelta):
                assert_type(event.arguments, str)
        assert_type(client.models(), tuple[str, ...])
        assert_type(client.with_options(timeout=3, retries=None, model="m", pool="p", cache_scope="u"), lacre.Client)
        assert_type(client.chat("x").cost, Decimal | None)
        assert_type(client.embed(["x"], timeout=3.0).vectors, tuple[tuple[float, ...], ...])
        assert_type(client.tokenize("x").ids, tuple[int, ...])
        assert_type(client.rerank("q", ["x"]).results, tuple[lacre.RankedText, ...])
        assert_type(client.post("/v1/chat/completions", json={}), httpx2.Response)


class Sea(pydantic.BaseModel):
    name: str


def structured(client: lacre.Client, schema: dict[str, object], params: dict[str, Any]) -> None:
    assert_type(client.chat("x", schema=Sea, **params).parsed(Sea), Sea)
    assert_type(client.chat("x", schema=schema).choices[0].parsed(list[Sea]), list[Sea])
    client.chat("x", schema=list[Sea]).parsed()


async def async_token() -> str:
    return "t"


async def async_client() -> None:
    async with lacre.AsyncClient(token=async_token, limits=httpx2.Limits(max_connections=1)) as client:
        assert_type(await client.chat("x"), lacre.Reply)
        async with client.chat_stream("x") as stream:
            assert_type(stream, lacre.AsyncChatStream)
            async for piece in stream:
                assert_type(piece, str)
            assert_type(await stream.reply(), lacre.Reply)
        assert_type(await client.models(), tuple[str, ...])


def programs() -> None:
    assert_type(lacre.OpenAI(token="t", pool="p"), openai.OpenAI)
    assert_type(lacre.info(lacre.OpenAI().models.list()).receipt, lacre.Receipt | None)
    assert_type(lacre.AsyncOpenAI(token=async_token), openai.AsyncOpenAI)
    openai.OpenAI(http_client=lacre.Client(), base_url=lacre.BASE_URL, api_key="sealed")
    openai.AsyncOpenAI(http_client=lacre.AsyncClient(), base_url=lacre.BASE_URL, api_key="sealed")
    client: httpx.Client = lacre.legacy.Client(token="t", kem=lacre.Kem.XWING, shape="none")
    assert_type(client.get("/v1/models"), httpx.Response)
    other: httpx.AsyncClient = lacre.legacy.AsyncClient(timeout=httpx.Timeout(3.0))
    assert other


def errors(error: lacre.LacreError) -> None:
    assert_type(error.remedy, str)
    if isinstance(error, lacre.RefusedError):
        assert_type(error.retry_after, float | None)
    if isinstance(error, lacre.ApiError):
        assert_type(error.code, str | None)


async def app(scope: object, receive: object, send: object) -> None: ...


def serving() -> None:
    key = key_file("service.key")
    assert_type(key, PrivateKey)
    assert_type(Sealed(app, keys=key).pins, tuple[str, ...])


def mistakes() -> None:
    """What must be refused: both checkers complain where an ignored line has no error in it."""
    lacre.Client(tokn="t")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lacre.Client(shape="round")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.OpenAI(pool=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.legacy.Client(transport=httpx.HTTPTransport())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.Client().chat(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.Client().chat("x", temprature=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lacre.Client().chat_stream("x", max_tokens="9")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.Client().explain("x", temperature=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lacre.Client(prices={"*": {"prompt": 1.0}})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    lacre.Client().chat("x", reasoning_effort="lots")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lacre.Client().embed("x", timout=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
