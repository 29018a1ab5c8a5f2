"""A connection is closed whatever became of the server: what a process does after that must still be done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from parts.fabric import LiveFabric


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_server_is_gone_with_something_left_to_say(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    live = LiveFabric.make(tmp_path)

    async def run() -> None:
        live.start()
        connection = await live.connect("provisioner")
        live.stop()
        while connection.connected:
            await asyncio.sleep(0.02)
        await connection.client.publish("presence.a.lacre.n1", b"{}")  # the library keeps it until it is connected again
        await connection.close()
        assert connection.lost

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
