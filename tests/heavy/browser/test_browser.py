"""The npm package in Chromium: sealed to a real gateway and worker from a page of another origin, through CORS."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from lacre.jose.jws import raw_public_key
from lacre.trust.chain import ConnectionString
from lacre_gateway.http.server import bind, make_server
from lacre_gateway.settings import Listen
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.npm import install
from parts.stage import Stage

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VERCEL = HERE.parent / "clients" / "vercel"
SAID = "one two"
ENTRY = """
export { generateText, streamText } from "ai";
export { createOpenAICompatible } from "@ai-sdk/openai-compatible";
"""
REFUSALS = sorted(path.stem for path in (ROOT / "tests" / "refusals" / "data").glob("*.json"))


class Quiet(SimpleHTTPRequestHandler):
    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
    }

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web server whose page has the package as it is packed, by the import map that it ships."""
    install(HERE)
    install(ROOT / "sdk" / "javascript")
    sys.path.insert(0, str(ROOT / "tools"))
    import npm_package  # noqa: PLC0415 - a tool, which is no part of any package

    made = tmp_path_factory.mktemp("site")
    (made / "package.json").write_text('{"type": "module", "private": true}')
    (made / ".npmrc").write_text((HERE / ".npmrc").read_text())
    archive = npm_package.packed(tmp_path_factory.mktemp("npm"))
    npm_package._run("npm", "install", str(archive), folder=made)
    shutil.copytree(HERE / "node_modules" / "openai", made / "node_modules" / "openai")
    bundled(made / "ai.js")
    shutil.copytree(ROOT / "tests" / "refusals" / "data", made / "refusals")
    shutil.copy(ROOT / "tests" / "interop" / "refusals.mjs", made)
    shipped = json.loads((made / "node_modules" / "lacre" / "importmap.json").read_text())
    shipped["imports"] |= {"openai": "./node_modules/openai/index.mjs", "ai": "./ai.js"}
    (made / "page.html").write_text((HERE / "page.html").read_text().replace("IMPORTMAP", json.dumps(shipped)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(made)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def bundled(file: Path) -> None:
    """Vercel's `ai` and its provider as one file: they have more modules than an import map wants to list."""
    install(VERCEL)
    esbuild = ROOT / "sdk" / "javascript" / "node_modules" / ".bin" / "esbuild"
    flags = ["--bundle", "--format=esm", "--platform=browser", "--log-level=error", f"--outfile={file}"]
    done = subprocess.run([str(esbuild), *flags], cwd=VERCEL, input=ENTRY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_page_seals(site: int, tmp_path: Path) -> None:
    page, stranger = f"http://127.0.0.1:{site}", f"http://localhost:{site}"
    async with Stage.on_air(tmp_path, Issuer(), settings=f'listen.origins = ["{page}"]') as stage:
        worker = await stage.worker()
        settings = Listen(port=0, drain=1)
        with bind(settings) as listener:
            server = make_server(stage.app, settings)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(functools.partial(server.serve, sockets=[listener]))
                gateway = f"http://127.0.0.1:{listener.getsockname()[1]}"
                environment = {
                    "PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHROMIUM": str(shutil.which("chromium")),
                    "PAGE": page, "STRANGER": stranger, "MODEL": MODEL, "LACRE_TOKEN": stage.token,
                    "REFUSALS": ",".join(REFUSALS),
                    "LACRE_URL": str(ConnectionString(gateway, raw_public_key(stage.keys.root))),
                }  # fmt: skip
                done = await anyio.run_process(["node", "drive.mjs"], cwd=HERE, env=environment, check=False)
                server.should_exit = True
        assert done.returncode == 0, done.stderr.decode()
        told = json.loads(done.stdout)
        requested = told.pop("requested")
        refusals = told.pop("refusals")
        assert [name for name, found in refusals.items() if found["cases"] >= 20 and found["wrong"] == []] == REFUSALS, refusals
        assert told == {
            "whole": {"text": SAID, "kem": "MLKEM768-X25519", "index": True, "tokens": len(SAID), "named": True},
            "streamed": {"text": SAID, "several": True, "left": "AbortError"},
            "refused": {"status": 404, "type": "urn:lacre:problem:unknown-pool", "named": True},
            "vercel": {"text": SAID, "streamed": SAID, "several": True, "refused": True},
            "remembered": [1],
            "tabs": [1, 1],
            "stranger": ["NetworkError", True],
        }
        assert not [name for name in requested if "memory_file" in name], "what needs Node is not loaded"
        assert not [name for name in requested if not name.startswith((page, gateway))]
        assert worker.calls >= 3
