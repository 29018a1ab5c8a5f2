"""A whole deployment with a console for each gateway: a real nats-server, gateways as processes, and workers that answer.

The workers are processes too, if a test asks for several: each stands in front of a small server of its own, which counts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2

from lacre.asgi import Send
from lacre_fabric.operate.nats_server import free_port
from parts.behind import Server, serving
from parts.chat_app import ChatApp
from parts.oidc_provider import Provider
from parts.stage import LiveStage, worker_settings
from parts.stage.settings import own_issuer
from parts.waiting import PATIENCE, until

WORDS = 20  # of an answer
PACE = 0.08  # seconds between two words of a stream
USAGE = {"prompt_tokens": 7, "completion_tokens": WORDS, "total_tokens": 7 + WORDS}
UPSTREAM = """
    [upstream]
    origin = "{origin}"
    [[upstream.models]]
    name = "tiny"
    allow = ["POST /v1/chat/completions"]
"""

READERS = """
@id("readers")
permit (principal in Group::"acme/readers", action in [Action::"admin:usage", Action::"admin:audit"], resource);
"""
OPERATORS = """
@id("operators")
permit (principal in Group::"acme/operators", action in Action::"admin", resource);
"""


@dataclass
class Consoles:
    """live: the deployment. urls: of the gateways' consoles. servers: behind the workers n1, n2 and so on."""

    live: LiveStage
    urls: Sequence[str]
    servers: Sequence[Server] = ()


def _tables(live: LiveStage, url: str, provider: Provider | None) -> str:
    tables = own_issuer(live.site) + f'\n[admin]\nport = {url.rpartition(":")[2]}\n[console]\nurl = "{url}"\n'
    if provider is None:
        return tables
    return f"""{tables}
        issuer = "{provider.url}"
        client_id = "console"
        scope = "lacre:console"
        resource = "urn:lacre:ES256"
        [[issuers]]
        issuer = "{provider.url}"
        audience = "lacre"
        algorithms = ["ES256", "RS256", "EdDSA"]
        [issuers.claims]
        tenant = "org.id"
        groups = "realm_access.roles"
    """


@asynccontextmanager
async def with_consoles(
    folder: Path, provider: Provider | None = None, *, gateways: int = 1, workers: int = 0
) -> AsyncIterator[Consoles]:
    """workers: processes; none: one worker in this process."""
    nodes = [f"n{number + 1}" for number in range(workers)]
    async with LiveStage(folder, {"default": ("tiny",)}) as live:
        await live.start_fabric(gateways=[f"g{number}" for number in range(2, gateways + 1)], nodes=nodes[1:])
        live.write_settings({"name": "tiny"})
        servers = [await live.stack.enter_async_context(serving(said)) for _ in nodes]
        for node, server in zip(nodes, servers, strict=True):
            live.worker(worker_settings(live.site, node, UPSTREAM.format(origin=server.url)), node)
        if nodes:
            await live.start_workers()
        else:
            await live.node(ChatApp())
        urls = [f"http://127.0.0.1:{free_port()}" for _ in range(gateways)]
        for url in urls:
            live.gateway(_tables(live, url, provider), drain=2)
        (live.policies / "roles.cedar").write_text(READERS + OPERATORS)
        await live.start_gateways()
        token = live.token("root", scopes=["lacre:admin"])
        for url in urls:
            await until(partial(_hears, url, token, workers or 1), PATIENCE)
        yield Consoles(live, urls, servers)


async def _hears(url: str, token: str, workers: int) -> bool:
    """Whether that gateway shows so many. A gateway that has just started hears the first presence within two seconds."""
    async with httpx2.AsyncClient(trust_env=False) as http:
        told = await http.get(f"{url}/v1/workers", headers={"authorization": f"Bearer {token}"})
    return len(told.raise_for_status().json()["workers"]) == workers


async def said(_scope: object, body: bytes, send: Send) -> None:
    """OpenAI's answer of `WORDS` words, streamed at a pace if that is asked for."""
    streams = json.loads(body).get("stream", False)
    kind = b"text/event-stream" if streams else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    text = [f"w{number} " for number in range(WORDS)]
    if not streams:
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(text)}, "finish_reason": "stop"}
        whole = {"id": "c", "object": "chat.completion", "model": "tiny", "choices": [choice], "usage": USAGE}
        await send({"type": "http.response.body", "body": json.dumps(whole).encode()})
        return
    for word in text:
        await asyncio.sleep(PACE)
        await _event(send, {"choices": [{"index": 0, "delta": {"content": word}}]})
    await _event(send, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    await _event(send, {"choices": [], "usage": USAGE})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _event(send: Send, members: dict[str, object]) -> None:
    event = {"id": "c", "object": "chat.completion.chunk", "model": "tiny", **members}
    await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
