"""Who floods the message server is named in the log, once, and who works is not."""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from pathlib import Path

from lacre_fabric import logs
from lacre_fabric.endpoints import Servers
from lacre_fabric.floods import MESSAGES, Flood, Rates, watch
from lacre_fabric.server import Server, free_port
from lacre_fabric.site import Site
from parts.stolen_nats import StolenNats, published


def said(*connections: tuple[int, str, int, int]) -> dict[str, object]:
    """A server's word on its connections: cid, user, messages and bytes that came from it."""
    names = ("cid", "authorized_user", "in_msgs", "in_bytes")
    return {"server_id": "s", "connections": [dict(zip(names, one, strict=True)) for one in connections]}


def test_what_is_a_flood() -> None:
    rates = Rates()
    assert rates.floods([said((1, "worker-a", 10**9, 0), (2, "gateway", 5, 5))], 2.0) == []  # since when, nobody knows
    assert rates.floods([said((1, "worker-a", 10**9 + 10_000, 0), (2, "gateway", 9, 9))], 2.0) == []
    found = rates.floods(
        [said((1, "worker-a", 10**9 + 10_500, 0), (3, "worker-b", 30_000, 0), (4, "worker-b", 30_000, 0))], 2.0
    )
    assert found == [Flood("worker-b", 30_000)]
    assert rates.floods([said((3, "worker-b", 30_001, 2**30), (4, "worker-b", 1, 1))], 2.0) == [Flood("worker-b", 0)]


def test_what_is_no_answer_says_nothing() -> None:
    rates = Rates()
    for odd in (None, [], {}, {"connections": 1}, {"connections": [1, {}, {"cid": "x", "in_msgs": None}]}):
        assert rates.floods([odd], 1.0) == []


async def test_the_flooding_user_is_named(tmp_path: Path) -> None:
    site, out = Site(tmp_path, {"a": ("m1",)}), StringIO()
    server = Server(tmp_path / "nats", free_port())
    server.configure(site.roles())
    process = server.start(tmp_path / "nats.log")
    logs.configure(out)
    watching = asyncio.ensure_future(watch(Servers.of(server.url), site.credential("inspector"), look=0.6))
    try:
        thief = await StolenNats.open(server.port, site.credential("worker-a-n1"))
        async with asyncio.timeout(30):
            while "fabric.flood" not in out.getvalue():
                thief.say(published("reply.a.g1.x", b"x") * MESSAGES)
                await thief.settle()
                assert not watching.done()
        await thief.close()
        lines = [line for text in out.getvalue().splitlines() if (line := json.loads(text))["event"] == "fabric.flood"]
        assert [line["role"] for line in lines] == ["worker-a-n1"]
        assert lines[0]["number"] > MESSAGES
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        process.terminate()
        process.wait(10)
