"""What a gateway publishes past the library's queue: it arrives whole and in order, or is kept within a limit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping

import nats.errors
import pytest

from lacre.errors import UsageError
from lacre_fabric.nats import client as clients
from lacre_fabric.nats import subjects
from lacre_fabric.nats.client import DirectClient
from lacre_fabric.nats.protocol import encode_publish
from parts.cut import way_to
from parts.fabric import Parties
from parts.waiting import until

SUBJECT = subjects.cancel("a", "0" * 32)
PIECES = 100  # more than a system's buffers take
FIELDS = {"Nats-Msg-Id": "0a" * 32, "Grant": "ey.J-_x.y", "Odd": "ü: é"}


async def heard(parties: Parties) -> list[tuple[str, bytes, bytes]]:
    """What arrives at a worker, as it comes."""
    worker, found = await parties.connect("worker-a-n1"), list[tuple[str, bytes, bytes]]()

    def take(*message: object) -> bool:
        found.append(message)  # type: ignore[arg-type]  # as `Take` has it
        return True

    await worker.client.subscribe_directly(subjects.cancel("a", "*"), take)
    await worker.round_trip()
    return found


async def test_a_message_is_the_one_that_the_library_would_send(parties: Parties) -> None:
    found, gateway = await heard(parties), await parties.connect("gateway-g1")
    for payload in (b"", b"\r\nPUB x 0\r\n\r\n", bytes(300_000)):
        await gateway.client.publish(SUBJECT, payload, headers=dict(FIELDS))
        await gateway.round_trip()
        await gateway.client.publish_directly(SUBJECT, payload, headers=FIELDS)
        await until(lambda: len(found) == 2)
        assert found[0] == found[1] and found[1][2] == payload
        found.clear()
    inbox, stream = f"{subjects.inbox('gateway-g1')}.asked", subjects.work_stream("a", subjects.DEFAULT_REGION)
    asked = await gateway.client.subscribe(inbox)
    await gateway.client.publish_directly(f"{subjects.API}.STREAM.INFO.{stream}", b"", reply=inbox, headers=FIELDS)
    assert b'"config"' in (await asked.next_msg(20)).data


async def test_messages_of_both_ways_keep_their_order(parties: Parties) -> None:
    found, gateway = await heard(parties), await parties.connect("gateway-g1")
    for number in range(300):
        if number % 3:
            await gateway.client.publish_directly(SUBJECT, b"%d" % number, headers={})
        else:
            await gateway.client.publish(SUBJECT, b"%d" % number)
        if number % 7 == 0:
            await asyncio.sleep(0)
    await until(lambda: len(found) == 300)
    assert [int(payload) for _, _, payload in found] == list(range(300))


async def test_the_messages_of_one_turn_are_one_write(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> None:
    found, gateway = await heard(parties), await parties.connect("gateway-g1")
    writes, write = list[bytes](), gateway.client._transport.write  # type: ignore[union-attr]  # it is connected

    def counted(data: bytes) -> None:
        writes.append(data)
        write(data)

    monkeypatch.setattr(gateway.client._transport, "write", counted)
    for number in range(5):
        await gateway.client.publish_directly(SUBJECT, b"%d" % number, headers={})
    await until(lambda: len(found) == 5)
    assert [data.count(b"HPUB") for data in writes if data.startswith(b"HPUB")] == [5]


async def test_what_a_lost_connection_did_not_take_leaves_by_the_next_one(parties: Parties) -> None:
    found = await heard(parties)
    way = await parties.stack.enter_async_context(way_to(parties.live.server.port))
    client, credential = DirectClient(), parties.live.credentials["gateway-g1"]
    await client.connect(
        way.url, user=credential.name, password=credential.password, reconnect_time_wait=0.05, max_reconnect_attempts=-1
    )
    parties.stack.push_async_callback(client.close)
    loss = asyncio.create_task(client._process_op_err(nats.errors.StaleConnectionError()))  # before this turn's messages leave
    await client.publish_directly(SUBJECT, b"in its last turn", headers=FIELDS)
    await loss
    assert not client.is_connected
    await client.publish_directly(SUBJECT, b"while it is away", headers=FIELDS)
    await until(lambda: len(found) == 2)
    assert [payload for _, _, payload in found] == [b"in its last turn", b"while it is away"]


async def test_a_server_that_reads_nothing_is_sent_only_so_much(own: Parties) -> None:
    client, piece, sent = (await own.connect("gateway-g1")).client, bytes(256 * 1024), 0

    async def publish() -> None:
        nonlocal sent
        for _ in range(PIECES):
            await client.publish_directly(SUBJECT, piece, headers={})
            await asyncio.sleep(0)
            sent += 1

    own.live.process.send_signal(signal.SIGSTOP)
    try:
        publishing = asyncio.create_task(publish())
        await asyncio.sleep(1)
        assert sent < PIECES, "a publisher waits"
        unsent = client._transport._io_writer.transport.get_write_buffer_size()  # type: ignore[union-attr]  # it is connected
        assert unsent + client.pending_data_size <= 2 * clients._MAX_UNSENT + 2 * len(piece)
    finally:
        own.live.process.send_signal(signal.SIGCONT)
    await publishing


async def test_who_waits_for_such_a_server_can_be_cancelled(own: Parties) -> None:
    """nats-py swallows the cancellation: the task would run on as if nothing were the matter."""
    client, piece = (await own.connect("gateway-g1")).client, bytes(256 * 1024)
    ran_on = False

    async def publish() -> None:
        nonlocal ran_on
        for _ in range(PIECES):
            await client.publish(SUBJECT, piece)
        ran_on = True

    own.live.process.send_signal(signal.SIGSTOP)
    try:
        publishing = asyncio.create_task(publish())
        await asyncio.sleep(1)
        assert not publishing.done()
        publishing.cancel()
        done, _ = await asyncio.wait([publishing], timeout=1.0)
        assert done and publishing.cancelled()
        async with asyncio.timeout(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await publish()
        assert not ran_on
    finally:
        own.live.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("subject", "reply", "headers"),
    [
        ("a b", "", {}),
        ("a\r\nPUB", "", {}),
        ("", "", {}),
        ("a", "b c", {}),
        ("a", "b\tc", {}),
        ("a", "", {"X": "1\r\nNats-Rollup: all"}),
        ("a", "", {"X": "1\n"}),
        ("a", "", {"X\r": "1"}),
        ("a", "", {"X": "1", "Y\nZ": "2"}),
    ],
)
def test_nothing_in_a_message_begins_another_line(subject: str, reply: str, headers: Mapping[str, str]) -> None:
    with pytest.raises(UsageError):
        encode_publish(subject, b"x", reply=reply, headers=headers)
