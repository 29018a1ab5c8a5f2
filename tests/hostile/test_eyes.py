"""That the adversary's eyes are open: what the end of every test looks for would be found."""

from __future__ import annotations

import base64

import pytest

from hostile.adversary import Eyes, GatewayOwner, HostileFabric
from lacre_fabric.work.frames import Frame, FrameKind
from parts.stage import Stage


@pytest.mark.parametrize(
    "encode",
    [bytes, bytes.hex, base64.b64encode, lambda text: base64.b64encode(b"a" + text),
     lambda text: base64.b64encode(b"ab" + text), lambda text: text.decode().encode("utf-16")],
)  # fmt: skip
def test_encodings(encode) -> None:
    eyes = Eyes()
    eyes.see(b"before")
    assert not eyes.has_seen("canary-0123456789abcdef")
    eyes.see(encode(b"canary-0123456789abcdef"))
    assert eyes.has_seen("canary-0123456789abcdef")


def test_frames(eyes: Eyes, fabric: HostileFabric) -> None:
    fabric.receive("1", Frame("0" * 32, 0, FrameKind.DATA, b"canary"))
    assert eyes.has_seen("canary")


async def test_what_a_client_sends_and_a_worker_gets(stage: Stage, gateway: GatewayOwner) -> None:
    """Nothing passes beside it: the sealed bytes that the worker opens are those that it saw leave the client."""
    await stage.worker()
    reply = await stage.client(gateway, token="token-8c1f").chat(stage.prompt, model="smollm2-135m")
    assert reply.text == stage.prompt
    for seen in ("token-8c1f", "smollm2-135m", "lacre-max-tokens"):
        assert gateway.eyes.has_seen(seen)
    assert gateway.posts[0].content in gateway.eyes.seen
    assert gateway.fabric.works[0].sealed in gateway.eyes.seen
