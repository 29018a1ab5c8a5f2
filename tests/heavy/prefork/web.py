"""What gunicorn loads, once, before it forks its workers: `GET /NUMBER` makes a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import service


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterator[bytes]:
    """WSGI. Answers with the process, and what came of the call."""
    seen = service.answer(int(environ["PATH_INFO"].strip("/")))
    start_response("200 OK", [("content-type", "text/plain; charset=utf-8")])
    return iter([f"{os.getpid()} {seen}".encode()])
