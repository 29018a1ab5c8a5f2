"""What a gateway says of itself: pools without a queue after a restart of NATS, and revocations in its audit log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
from functools import partial
from pathlib import Path

import pytest

from lacre import errors
from lacre_fabric.logs import make_log
from lacre_fabric.operate import dev_issuer
from lacre_fabric.work.contract import Backlog, FabricUnavailable, NoQueue
from lacre_fabric.work.revocations import subject_key
from lacre_gateway.observe.queues import Queues
from parts.chat_app import ChatApp
from parts.stage import LiveStage
from parts.up import LACRE
from parts.waiting import until


class Backlogs:
    """Some pools have no queue, and for some NATS does not answer."""

    def __init__(self) -> None:
        self.without: set[str] = set()
        self.silent: set[str] = set()

    async def backlog(self, pool: str, _region: str) -> Backlog:
        if pool in self.without:
            raise NoQueue("none")
        if pool in self.silent:
            raise FabricUnavailable("no answer")
        return Backlog(0)


async def test_a_pool_without_a_queue_is_named_once_and_only_all_of_them_count() -> None:
    log, fabric = io.StringIO(), Backlogs()
    queues = Queues(make_log(log), lambda: fabric, lambda: [("a", "lacre"), ("b", "lacre")])
    for without, silent, lost, served in (
        (set(), set(), set(), True),
        ({"a"}, set(), {"a"}, True),
        ({"a"}, {"b"}, {"a"}, True),
        (set(), {"a"}, {"a"}, True),  # not answered is not found
        ({"a", "b"}, set(), {"a", "b"}, False),
        (set(), set(), set(), True),
    ):
        fabric.without, fabric.silent = without, silent
        await queues.look()
        assert (queues.lost, queues.served) == (lost, served)
    said = [json.loads(line) for line in log.getvalue().splitlines()]
    told = [(entry["event"], entry["pool"]) for entry in said]
    assert told == [("queue.missing", "a"), ("queue.missing", "b"), ("queue.found", "a"), ("queue.found", "b")]
    assert "lacre keys tend" in said[0]["remedy"]


def lacre(*words: str | Path) -> str:
    done = subprocess.run([*LACRE, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def has_queue(live: LiveStage) -> bool:
    connection = await live.connect()
    try:
        return "WORK_default_lacre" in [info.config.name for info in await connection.jetstream.streams_info()]
    finally:
        await connection.close()


@pytest.mark.slow
async def test_a_gateway_after_a_restart_of_nats_and_a_revocation(tmp_path: Path) -> None:
    async with LiveStage.on_air(tmp_path, ChatApp()) as live:
        [first], state = live.gateways, live.site.folder

        async def lost() -> bool:
            return "lacre keys tend" in (await first.missing()).get("queues", "")

        async def restarted() -> None:
            live.nats.kill()
            live.nats.wait()
            live.start_nats()

        await restarted()
        await until(lost, 30, first.said)
        await asyncio.to_thread(lacre, "keys", "tend", "--state", state)
        await first.ready()

        staying = [*LACRE, "keys", "tend", "--stay", "--state", str(state)]
        tending = await asyncio.create_subprocess_exec(*staying, stderr=subprocess.DEVNULL)
        try:
            await restarted()  # its queues are gone: a request without one gets a 503
            await until(partial(has_queue, live), 60)
            await first.ready()
            async with live.client(live.token("bob")) as client:
                answered: list[str] = []

                async def serves() -> bool:
                    """Once the worker has told its presence again, which NATS lost."""
                    with contextlib.suppress(errors.Unavailable):
                        answered.append((await client.chat("Count.", max_tokens=8)).text)
                    return bool(answered)

                await until(serves, 30, first.said)
                assert answered == ["one two three"]
        finally:
            tending.terminate()
            await tending.wait()

        await asyncio.to_thread(lacre, "revoke", "--sub", "bob", "--settings", first.settings)

        def recorded() -> list[tuple[str | None, str | None]]:
            return [(each["actor"], each["target"]) for each in live.entries("event") if each["event"] == "revoked"]

        await until(recorded, 15, first.said)
        assert recorded() == [(None, subject_key(dev_issuer.ISSUER, "bob"))]
