"""What a malicious caller writes by hand, and how a worker takes it."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict
from lacre.wire import varint
from lacre.wire.bhttp import encode_request
from parts.keys import MODEL
from parts.stage import Stage

FORM = "the whole message in the seal is checked before it is used (RFC 9292)"


def chat(stage: Stage, **members: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": stage.prompt}], **members}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def part(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def by_hand(*headers: tuple[bytes, bytes], content: bytes = b"{}", path: bytes = b"/v1/chat/completions") -> bytes:
    """A known-length request that no encoder of ours would write."""
    date = (b"date", formatdate(time.time(), usegmt=True).encode())
    control = b"".join(map(part, (b"POST", b"https", b"lacre.invalid", path)))
    lines = b"".join(part(name) + part(value) for name, value in (date, *headers))
    return b"\x00" + control + part(lines) + part(content) + b"\x00"


async def unread(gateway: GatewayOwner, stage: Stage, verdict: Verdict, message: bytes) -> None:
    """The worker takes `message` for no request: the app is not called, and it goes on working for others."""
    worker = await stage.worker()
    verdict.said((await gateway.submit(message)).problem)
    assert worker.calls == 0
    assert (await gateway.submit(encode_request(inner(chat(stage))))).status == 200


async def told(gateway: GatewayOwner, stage: Stage, verdict: Verdict, message: bytes, *, calls: int = 0, **grant: Any) -> None:
    """The worker answers `message` with an error inside the seal."""
    worker = await stage.worker()
    answer = await gateway.submit(message, **grant)
    assert answer.problem is None
    verdict.answered(answer.status, answer.code)
    assert worker.calls == calls
