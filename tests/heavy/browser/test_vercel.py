"""Vercel's `ai` over the npm package, unchanged: `createOpenAICompatible({ fetch, baseURL: BASE_URL })`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import anyio

from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.npm import install
from parts.relay import Relay

HERE = Path(__file__).resolve().parent
VERCEL = HERE.parent / "clients" / "vercel"


async def test_the_package_ai(tmp_path: Path) -> None:
    install(HERE.parents[2] / "sdk" / "javascript")
    install(VERCEL)
    app, left = ChatApp(), anyio.Event()

    async def before(i: int) -> None:
        """Holds back the rest of the answer that the program leaves."""
        if len(app.scopes) == 3 and i > 2:
            await left.wait()

    async with serving(Gateway(Relay(app), before)) as gateway:
        environment = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(tmp_path)}
        environment |= {"LACRE_URL": gateway.url, "LACRE_TOKEN": "t0ken"}
        command = [str(shutil.which("node")), "by_vercel.mjs", str(VERCEL)]
        done = await anyio.run_process(command, cwd=HERE, env=environment, check=False)
        left.set()
    told = {name: value for line in done.stdout.splitlines() for name, value in json.loads(line).items()}
    refused = told.pop("refused", {})
    assert told == {"whole": "one two three", "streamed": {"text": "one two three", "several": True}, "left": True}, done.stderr
    assert refused["name"] and "nobody" in refused["message"]
    assert b"numbers" not in b"".join(request.content for request in gateway.relay.requests)
