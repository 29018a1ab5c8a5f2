"""The worker's API against its description: schemathesis sends whatever the vendors' types allow, and more, to a real server.

It lives in an environment of its own (`make tested`), and is left out where that is missing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from lacre.asgi import App, Send
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaReranker
from lacre_backend.engine.generate import LlamaSettings
from lacre_backend.engine.protocol import ControlToken, InfillTokens
from parts.behind import Respond, serving
from parts.echo_engine import N_VOCAB, EchoEngine
from parts.tiny_model import tiny_reranker
from parts.worker_openapi import BODIES, document

SCHEMATHESIS = Path(__file__).resolve().parents[2] / "build" / "contract" / "bin" / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = os.environ.get("LACRE_CONTRACT_EXAMPLES", "8")  # of each endpoint; a search by hand takes thousands
MODELS = ("echo", "rank")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """Every endpoint has a model that can answer."""
    with ExitStack() as stack:
        echo = stack.enter_context(closing(EchoEngine(n_ctx=4096, repeat=3)))
        marks = [ControlToken(N_VOCAB + i, f"<|fim_{name}|>") for i, name in enumerate("psm")]
        echo.model = dataclasses.replace(echo.model, infill=InfillTokens(*marks), n_vocab=N_VOCAB + len(marks))
        path = tiny_reranker(tmp_path / "rank.gguf")
        rank = LlamaReranker(path, name="rank", digest="sha256:1", settings=LlamaSettings(threads=1))
        yield create_app([echo, stack.enter_context(closing(rank))])


def answered_by(app: App, statuses: Counter[tuple[str, int]]) -> Respond:
    async def respond(scope: Any, body: bytes, send: Send) -> None:
        bodies = [body]

        async def receive() -> Any:
            if not bodies:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": bodies.pop()}

        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses[scope["path"], message["status"]] += 1
            await send(message)

        await app(scope, receive, count)

    return respond


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed: `make tested`")
async def test_no_breach(app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(document(MODELS)))
    statuses: Counter[tuple[str, int]] = Counter()
    async with serving(answered_by(app, statuses)) as server:
        command = [
            str(SCHEMATHESIS), "run", str(schema), "--url", server.url, "--checks", CHECKS,
            "--phases", "fuzzing", "--no-color", "--request-timeout", "30", "--seed", "1", "--max-examples", EXAMPLES,
            "--suppress-health-check", "all",
        ]  # fmt: skip
        done = await asyncio.to_thread(
            subprocess.run, command, check=False, capture_output=True, text=True, timeout=100 + 10 * int(EXAMPLES), cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert {path for path, _ in statuses} >= BODIES.keys()
    assert sum(count for (_, status), count in statuses.items() if status == 200) > 0, statuses
    assert [record for record in caplog.records if record.exc_info] == []


def test_the_description_is_complete(app: App) -> None:
    routes = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
    assert set(document(MODELS)["paths"]) == routes
