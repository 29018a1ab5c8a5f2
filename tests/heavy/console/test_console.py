"""Each page of the console in Chromium, against two gateways, three workers and NATS under load: what it does and shows.

Every process is a real one. Pictures of every page, wide and at phone width, light and dark, are in build/screens.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import anyio

import lacre
from parts.console_operator import Operator
from parts.console_site import Consoles, with_consoles
from parts.memory import found_in_memory
from parts.npm import install

HERE = Path(__file__).resolve().parent
SCREENS = HERE.parents[2] / "build" / "screens"
HOSTILE = "<script>alert(1)</script>"
CANARY = f"canary-{os.urandom(8).hex()}"  # in every prompt: no process's memory holds it yet
PLANTED = f"planted-{os.urandom(8).hex()}"  # a caller's name, which gateways do know
PAGES = ("", "tenants", "tenant?tenant=acme", "requests", "policy", "keys", "workers", "audit", "audit/export", "me")
CALLS = (
    "/metrics", "/v1/status", "/v1/usage?tenant=acme", "/v1/tenants", "/v1/revocations", "/v1/minutes", "/v1/workers",
    "/v1/requests", "/v1/requests/usage?tenant=acme", "/v1/policy", "/v1/keys", "/v1/checkpoint",
)  # fmt: skip


async def asked(consoles: Consoles, seconds: float) -> int:
    """Chats of several people, one with a hostile name, for so long; how many."""
    live, done = consoles.live, 0

    async def ask(name: str, gateway: str) -> None:
        nonlocal done
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        async with live.client_of(gateway, live.token(name), None) as client:
            while loop.time() < end:
                await client.chat(f"Remember {CANARY}.", max_tokens=64)
                done += 1

    urls = [gateway.url for gateway in live.gateways]
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(("alice", PLANTED, HOSTILE, "carol")):
            group.create_task(ask(name, urls[number % len(urls)]))
    return done


async def refused(consoles: Consoles) -> None:
    live = consoles.live
    async with live.client_of(live.gateways[0].url, live.token("eve"), None) as client:
        for asking in (client.chat("x", max_tokens=99_999),):
            try:
                await asking
            except lacre.LacreError:
                continue
            raise AssertionError("it was to be refused")


async def test_every_page(tmp_path: Path) -> None:
    install(HERE)
    SCREENS.mkdir(parents=True, exist_ok=True)
    async with with_consoles(tmp_path, gateways=2, workers=3) as consoles:
        assert await asked(consoles, 3.0) > 10
        await refused(consoles)
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHROMIUM": str(shutil.which("chromium")),
            "CONSOLE": consoles.urls[0], "TOKEN": consoles.live.token("root", scopes=["lacre:admin"]), "SCREENS": str(SCREENS),
        }  # fmt: skip
        load = asyncio.create_task(asked(consoles, 20.0))
        done = await anyio.run_process(["node", "drive.mjs"], cwd=HERE, env=environment, check=False)
        await load
        assert done.returncode == 0, done.stderr.decode()
        told = json.loads(done.stdout)
        assert {status for status, _ in told["pages"].values()} == {200}
        assert told["faults"] == []
        assert told["serious"] == {}
        assert told["overflow"] == []
        assert told["requested"] == [consoles.urls[0]], "nothing of another origin is loaded"
        assert "root of acme" in told["offered"]
        assert (told["verified"], told["empty"]) == ("The log holds:", "No request of the log fits.")
        assert int(told["replayed"].replace("\u202f", "")) > 10
        assert told["checkpoint"].startswith("lacre-checkpoint-")
        assert told["session"] == [[True, "Lax", "/"]]
        assert (told["scripted"], told["skip"], told["live"]) == ("", "Skip to the content", True)
        assert (told["framed"], told["crossed"]) == (False, "This form did not come from this session of the console")
        assert (told["out"], told["kept"]) == ("You are signed out", "/console/sign-in")
        assert told["drained"] == ["drained", "Resume", "takes work again"]
        await nowhere(consoles)


async def nowhere(consoles: Consoles) -> None:
    """The prompts' word is in no page, answer of the API, log, file or memory of a gateway. The workers' servers did get it."""
    live = consoles.live
    assert any(CANARY.encode() in body for server in consoles.servers for body in server.bodies)
    for number, gateway in enumerate(live.gateways):
        assert gateway.runs
        operator = Operator.of(consoles, number)
        await operator.sign_in()
        parts = {path: await operator.read(path) for path in (*(f"/console/{page}" for page in PAGES), *CALLS)}
        folder = live.site.folder / "gateway" / f"audit-{gateway.name}"
        kept = (gateway.log, *files(folder), *files(folder.with_name(f"{folder.name}-console")))
        parts |= {str(path): path.read_bytes() for path in kept}
        assert [name for name, content in parts.items() if CANARY.encode() in content] == []
        assert any(b"alice" in content for content in parts.values()) or number, "what is looked through has names"
    for process in (*live.gateways, *live.workers):
        assert process.runs, process.said()
    needles = {"canary": CANARY.encode(), "planted": PLANTED.encode()}
    found = [await asyncio.to_thread(found_in_memory, gateway.process.pid, needles) for gateway in live.gateways]
    assert set.union(*found) == {"planted"}, "the search finds what gateways know, and no word of a prompt"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
