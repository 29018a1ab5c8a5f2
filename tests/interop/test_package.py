"""The npm package as `make npm` packs it: installed into a clean folder, run from there, its types read, and its size."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.npm import install
from parts.relay import Relay

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "sdk" / "javascript"
NODE, NPM = shutil.which("node"), shutil.which("npm")
MOST = 60 * 1024  # bytes of the package and all that it needs, minified and compressed

pytestmark = [
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed"),
    pytest.mark.slow,
    pytest.mark.xdist_group("npm-package"),
]

PROGRAM = """
import { BASE_URL, infoOf, sealedFetch } from "lacre";
const fetch = await sealedFetch(process.env.LACRE_URL, { token: "t" });
const body = JSON.stringify({ messages: [{ role: "user", content: "x" }] });
const headers = { "content-type": "application/json" };
const response = await fetch(`${BASE_URL}/chat/completions`, { method: "POST", body, headers });
const { choices } = await response.json();
console.log(choices[0].message.content, infoOf(response).parts[0].receipt.completion_tokens);
"""
TYPED = """
import { type ClientOptions, sealedFetch, ProblemError, infoOf } from "lacre";
const fetch = await sealedFetch("lacre://a?trust=b", { token: async ({ renew }) => (renew ? "a" : "b"), kems: ["xwing"] });
const again: typeof globalThis.fetch = fetch.with({ cacheScope: "ada", resume: 0 });
const tokens: number | undefined = infoOf(await again("/v1/models"))?.parts[0]?.receipt?.completion_tokens;
const wait: number | null = new ProblemError({} as any).retryAfter;
// @ts-expect-error there is no such shape
const options: ClientOptions = { token: "t", shape: "round" };
export { options, tokens, wait };
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that installed the package from its file, and nothing else."""
    install(SOURCE)
    made = tmp_path_factory.mktemp("npm")
    sys.path.insert(0, str(ROOT / "tools"))
    import npm_package  # noqa: PLC0415 - a tool, which is no part of any package

    archive = npm_package.packed(made)
    project = made / "project"
    project.mkdir()
    (project / "package.json").write_text('{"type": "module", "private": true}')
    (project / ".npmrc").write_text((SOURCE / ".npmrc").read_text())
    run("npm", "install", str(archive), folder=project)
    return project


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [str(shutil.which(command[0])), *command[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_it_runs_from_a_clean_folder(folder: Path, tmp_path: Path) -> None:
    program = anyio.Path(folder / "program.mjs")
    await program.write_text(PROGRAM)
    async with serving(Gateway(Relay(ChatApp()))) as gateway:
        environment = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(tmp_path), "LACRE_URL": gateway.url}
        done = await anyio.run_process([str(NODE), str(program)], cwd=folder, env=environment, check=False)
    assert done.stdout.decode() == "one two three 3\n", done.stderr


def test_it_holds_what_it_should(folder: Path) -> None:
    package = folder / "node_modules" / "lacre"
    manifest = json.loads((package / "package.json").read_text())
    assert manifest["version"] in (ROOT / "sdk" / "lacre" / "_version.py").read_text()
    assert set(manifest["dependencies"]) == {"@hpke/core", "@hpke/chacha20poly1305", "@hpke/hybridkem-x-wing"}
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    top = {path.name for path in package.iterdir()}
    assert top == {"LICENSE", "README.md", "importmap.json", "package.json", "src", "types"}
    for name, address in json.loads((package / "importmap.json").read_text())["imports"].items():
        assert (folder / address).is_file(), name


def test_only_the_file_store_needs_more_than_a_browser_has() -> None:
    with_node = [path.name for path in (SOURCE / "src").rglob("*.js") if "node:" in path.read_text()]
    assert with_node == ["memory_file.js"]


def test_its_types(folder: Path) -> None:
    (folder / "typed.ts").write_text(TYPED)
    tsc = SOURCE / "node_modules" / ".bin" / "tsc"
    flags = ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2024,dom,dom.iterable"]
    run(str(tsc), *flags, "typed.ts", folder=folder)


def test_its_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    esbuild = SOURCE / "node_modules" / ".bin" / "esbuild"
    flags = ["--bundle", "--minify", "--format=esm", "--platform=browser", "--external:node:*", "--log-level=error"]
    bundle = run(str(esbuild), "node_modules/lacre/src/index.js", *flags, folder=folder)
    size = len(gzip.compress(bundle.encode()))
    with capsys.disabled():
        print(f"\nminified {len(bundle)}, compressed {size} bytes")
    assert size < MOST
