"""The npm package `lacre` beneath `openai` for Node, unchanged: `new OpenAI({ fetch, baseURL: BASE_URL })`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import anyio
import pytest

from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.npm import install
from parts.relay import Relay

HERE = Path(__file__).resolve().parent
OPENAI = HERE.parent / "ecosystem" / "node"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


async def test_the_package_openai(tmp_path: Path) -> None:
    install(HERE.parents[1] / "sdk" / "javascript")
    install(OPENAI)
    app, left = ChatApp(), anyio.Event()

    async def before(i: int) -> None:
        """Holds back the rest of the two answers that the program leaves."""
        if len(app.scopes) in {3, 4} and i > 2:
            await left.wait()

    async with serving(Gateway(Relay(app), before)) as gateway:
        environment = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(tmp_path)}
        environment |= {"LACRE_URL": gateway.url, "LACRE_TOKEN": "t0ken"}
        command = [str(NODE), "by_openai.mjs", str(OPENAI)]
        done = await anyio.run_process(command, cwd=HERE, env=environment, check=False)
        left.set()
    told = {name: value for line in done.stdout.splitlines() for name, value in json.loads(line).items()}
    assert told == {
        "whole": {"text": "one two three", "receipt": 3},
        "streamed": "one two three",
        "left": True,
        "refused": {"name": "BadRequestError", "status": 400, "message": "400 messages: must not be empty"},
        "done": True,
    }, done.stderr
    salts = [dict(scope["headers"])[b"lacre-cache-salt"] for scope in app.scopes]
    own, *_, ada, same, bert = salts
    assert ada == same
    assert len({own, ada, bert}) == 3, "each user has a prefix cache apart"
    assert set(salts[:-3]) == {own}
    assert b"bert" not in app.bodies[-1]
