"""Requests are settled by MACs: real gateway and worker processes, real NATS, the real model."""

from __future__ import annotations

from pathlib import Path

from lacre_fabric.operate.nats_server import free_port
from parts.scraping import receipt_checks
from parts.stage.live import LiveStage
from parts.stage.settings import own_issuer
from parts.waiting import until


async def test_every_request_is_settled_by_its_mac(tmp_path: Path) -> None:
    """Whole answers, and one whose client left: its last receipt has a MAC too."""
    port = free_port()
    async with LiveStage.on_air(tmp_path, workers=1, gateways=0) as live:
        live.gateway(own_issuer(live.site) + f"[admin]\nport = {port}\n")
        await live.start_gateways()
        async with live.client(live.token("alice")) as client:
            for _ in range(3):
                assert (await client.chat("Name a sea.", max_tokens=8)).text
            async with client.chat_stream("Count to a thousand.", max_tokens=900) as stream:
                async for _piece in stream:
                    break
        await until(lambda: len(live.entries("outcome")) == 4, why=lambda: live.entries("outcome"))
        outcomes = live.entries("outcome")
        assert [outcome["unreceipted"] for outcome in outcomes] == [False] * 4
        assert outcomes[-1]["outcome"] == "client-gone"
        assert await receipt_checks(port) == {"mac": 4}
