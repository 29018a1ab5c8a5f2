"""What a malicious caller writes by hand."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

from lacre.wire import varint
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
