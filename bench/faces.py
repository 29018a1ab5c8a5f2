"""What a token of a stream costs the worker in each API: processor instructions, counted by valgrind.

    PYTHONPATH=tests .venv/bin/python -m bench.faces

The engine follows a script, so all of the count is the worker's own. That is the queue of events, the parser of calls and
reasoning, the writer of the face, JSON and the framing of events. A run of few tokens is subtracted from one of many, so the
start counts for nothing. The rounds of the faces alternate. `tools` offers a function, so the parser of calls reads each text.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from bench import command
from lacre_backend.api.app import create_app
from parts.scripted_engine import ScriptedEngine

FEW, MANY = 100, 1100  # tokens of an answer
PATHS: Final = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
_SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
_TOTAL = re.compile(r"^(?:summary|totals): (\d+)", re.MULTILINE)


def _body(face: str, *, tools: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "scripted", "stream": True}
    asked |= {"input": "Go on."} if face == "responses" else {"messages": [{"role": "user", "content": "Go on."}]}
    asked |= {"max_output_tokens" if face == "responses" else "max_tokens": 2 * MANY}
    if tools and face == "chat":
        asked["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}]
    elif tools and face == "responses":
        asked["tools"] = [{"type": "function", "name": "weather", "parameters": _SCHEMA}]
    elif tools:
        asked["tools"] = [{"name": "weather", "input_schema": _SCHEMA}]
    return asked


async def _stream(face: str, tokens: int, *, tools: bool) -> None:
    answer = ("abcdefghij" * tokens)[:tokens]
    body = json.dumps(_body(face, tools=tools)).encode()
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        sent.append(message.get("body", b""))

    with closing(ScriptedEngine(lambda _: answer, n_ctx=8192)) as engine:
        app = create_app([engine])
        for _ in range(2):  # the first one fills caches
            waiting = [{"type": "http.request", "body": body, "more_body": False}]
            await app(
                {"type": "http", "method": "POST", "path": PATHS[face], "headers": [], "query_string": b""}, receive, send
            )
    events = b"".join(sent).count(b"\ndata: ") + b"".join(sent).startswith(b"data: ")
    assert events >= 2 * tokens, f"{face} wrote {events} events for {2 * tokens} tokens"


def _counted(face: str, tokens: int, *, tools: bool) -> int:
    """Instructions of a process that streams two such answers."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "callgrind"
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--quiet"]
        child = [sys.executable, "-m", "bench.faces", face, str(tokens), "tools" if tools else "text"]
        env = os.environ | {"PYTHONHASHSEED": "0"}
        subprocess.run([*tool, *child], check=True, env=env)
        found = _TOTAL.search(out.read_text())
        assert found is not None
        return int(found[1])


def measure(quick: bool) -> command.Figures:
    figures: command.Figures = {}
    for tools in (False, True):
        rounds: dict[str, list[float]] = {face: [] for face in PATHS}
        for _ in range(1 if quick else 3):
            for face, costs in rounds.items():
                many, few = (_counted(face, tokens, tools=tools) for tokens in (MANY, FEW))
                costs.append((many - few) / (2 * (MANY - FEW)))
        median = {face: statistics.median(costs) for face, costs in rounds.items()}
        kind = "tools" if tools else "text"
        figures |= {f"{kind}_{face}_instructions": round(cost) for face, cost in median.items()}
        figures |= {f"{kind}_{face}_ratio": round(median[face] / median["chat"], 3) for face in ("responses", "messages")}
    return figures


if __name__ == "__main__":
    if len(sys.argv) == 4:
        asyncio.run(_stream(sys.argv[1], int(sys.argv[2]), tools=sys.argv[3] == "tools"))
    else:
        command.run(__doc__, {"faces": measure})
