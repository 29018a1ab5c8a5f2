"""What a node logs when the app that it calls breaks: ids and places, and nothing of the prompt."""

from __future__ import annotations

import asyncio
import email.utils
import secrets
import time

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.asgi import Receive, Scope, Send
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Manifest
from lacre.wire.bhttp import Request, encode_request
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre_backend.node.node import Identity, Node
from lacre_fabric.work.contract import Work
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.grants import Grant
from parts.memory_fabric import MemoryFabric

CANARY = "canary-7f3a91"


async def broken_app(_scope: Scope, receive: Receive, _send: Send) -> None:
    message = await receive()
    raise KeyError(message["body"])


async def test_a_broken_app_logs_nothing_of_the_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    structlog.reset_defaults()  # its renderer shows local variables; the node must not give it any
    signer, key, now = Ed25519PrivateKey.generate(), PrivateKey.generate(1), time.time()
    manifest = Manifest("https://issuer.example", 1, now, now + 60, raw_public_key(signer), {})
    inner = Request(
        "POST", "https", "lacre.invalid", "/v1/chat/completions",
        (("date", email.utils.formatdate(now, usegmt=True)),), CANARY.encode(),
    )  # fmt: skip
    sealed, header, _ = seal_request(key.config, encode_request(inner))
    request_id = secrets.token_hex(16)
    enc = b64u(header.digest)
    grant = Grant(request_id, now, now + 60, "a", "m1", "chat", "none", 9, 9, (), ("A" * 22, "B" * 22), enc).sign(signer)

    hub = MemoryFabric()
    node = Node(hub.worker("a", ["m1"]), broken_app, Identity("a", lambda: {1: key}, signer, lambda: manifest))
    running = asyncio.create_task(node.run())
    work = Work(request_id=request_id, pool="a", model="m1", digest=header.digest, grant=grant, sealed=sealed)
    dispatch = await hub.gateway().dispatch(work)
    frames = [frame async for frame in dispatch.frames()]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await node.drain(1)

    assert (frames[-1].kind, frames[-1].payload) == (FrameKind.ERROR, problems.INTERNAL.type.encode())
    logged = "".join(capfd.readouterr())
    assert request_id in logged
    assert "KeyError" in logged
    assert CANARY not in logged
