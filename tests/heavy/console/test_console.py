"""Each page of the console in Chromium, against real gateways, a worker and NATS under load: what it does, and how it looks.

Pictures of every page, wide and at phone width, light and dark, are in build/screens.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import anyio
import httpx2

import lacre
from parts.console_site import Consoles, with_consoles
from parts.npm import install
from parts.waiting import PATIENCE, until

HERE = Path(__file__).resolve().parent
SCREENS = HERE.parents[2] / "build" / "screens"
HOSTILE = "<script>alert(1)</script>"
CANARY = "canary-4b1f9d"
BROWSERS = 4


async def asked(consoles: Consoles, seconds: float) -> int:
    """Chats of several people, one with a hostile name, for so long; how many."""
    live, done = consoles.live, 0

    async def ask(name: str, gateway: str) -> None:
        nonlocal done
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        async with live.client_of(gateway, live.token(name), None) as client:
            while loop.time() < end:
                await client.chat(f"Remember {CANARY}.", max_tokens=8)
                done += 1

    urls = [gateway.url for gateway in live.gateways]
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(("alice", "bob", HOSTILE, "carol")):
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


async def links(consoles: Consoles, count: int) -> list[str]:
    """As `lacre admin open` asks for them."""
    token = consoles.live.token("root", scopes=["lacre:admin"])
    headers = {"authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(trust_env=False) as client:
        made = [await client.post(f"{consoles.urls[0]}/v1/console/links", headers=headers) for _ in range(count)]
    assert {answer.status_code for answer in made} == {201}, made[0].text
    return [answer.json()["url"] for answer in made]


async def test_every_page(tmp_path: Path) -> None:
    install(HERE)
    SCREENS.mkdir(parents=True, exist_ok=True)
    async with with_consoles(tmp_path, gateways=2) as consoles:
        assert await asked(consoles, 3.0) > 10
        await refused(consoles)
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHROMIUM": str(shutil.which("chromium")),
            "CONSOLE": consoles.urls[0], "LINKS": json.dumps(await links(consoles, BROWSERS)), "SCREENS": str(SCREENS),
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
        await until(lambda: consoles.live.gateways[0].runs, PATIENCE)
        folder = consoles.live.site.folder / "gateway" / "audit-g1-console"
        kept = b"".join(path.read_bytes() for path in folder.iterdir())
        whole = kept + consoles.live.gateways[0].log.read_bytes()
        assert b"alice" in whole
        assert CANARY.encode() not in whole
