"""What one credential may take of the message server: no bucket, account or message without a bound, and no bucket wiped."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from lacre.errors import SettingsError
from lacre_fabric.nats import revocations, subjects
from lacre_fabric.nats import streams as layout
from lacre_fabric.nats.accounts import WORKER_PAYLOAD, WORKER_SUBSCRIPTIONS, accounts
from lacre_fabric.nats.kv import NatsBucket, dump
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import INSPECTION, MAX_SLOTS, SYSTEM, gateway_account, workers_account
from lacre_fabric.nats.streams import BucketLimits
from lacre_fabric.operate.nats_server import LOG_SIZE, LOGS, MAX_FILES, configuration
from lacre_fabric.operate.site import Site
from lacre_fabric.work.contract import FabricUnavailable
from parts.fabric import POOLS, LiveFabric
from parts.stolen_nats import StolenNats

SMALL = BucketLimits(64 * 1024, 100, 512)
NEVER = {"Nats-TTL": "never"}


def file_bytes(pools: int) -> int:
    """What the buckets of so many pools may come to on each server: `max_file_store` must not be less."""
    return layout.TRUST.size + layout.BUDGETS.size + revocations.MAX_BYTES + pools * layout.CLAIMS.size


@pytest.fixture
async def small(nats: LiveFabric) -> AsyncIterator[LiveFabric]:
    """The server with little room for claims."""
    provisioner = await nats.connect("provisioner")
    for pool in POOLS:
        await provisioner.jetstream.delete_stream(f"KV_claims_{pool}")
    await provision(provisioner, POOLS, claims=SMALL)
    yield nats
    for pool in POOLS:
        await provisioner.jetstream.delete_stream(f"KV_claims_{pool}")
    await provisioner.close()
    await nats.provision()


class Stolen:
    """Opens raw connections with credentials of the server's, and closes them at the end."""

    def __init__(self, live: LiveFabric) -> None:
        self._live = live
        self.open: list[StolenNats] = []

    async def __call__(self, role: str) -> StolenNats:
        self.open.append(await StolenNats.open(self._live.server.port, self._live.credentials[role]))
        return self.open[-1]


@pytest.fixture
async def raw(nats: LiveFabric) -> AsyncIterator[Stolen]:
    stolen = Stolen(nats)
    yield stolen
    for each in stolen.open:
        await each.close()


@pytest.mark.usefixtures("small")
async def test_full_claims_stop_their_own_pool_alone(raw: Stolen) -> None:
    stolen = await raw("worker-a-n1")
    answers = [await stolen.ask(f"$KV.claims_a.fill{number}", bytes(300)) for number in range(SMALL.messages + 5)]
    assert [("error" in answer) for answer in answers] == [False] * SMALL.messages + [True] * 5
    others = {
        "worker-b-n1": "$KV.claims_b.x",
        "gateway-g1": "$KV.budgets.gateway-g1.x",
        "gateway-g2": subjects.revocation("gateway-g2"),
    }
    for role, subject in others.items():
        other = await raw(role)
        assert "error" not in await other.ask(subject, b"x")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"data": bytes(SMALL.largest + 1)}, "message size exceeds maximum allowed"),
        ({"data": b"x", "headers": NEVER}, "per-message TTL is disabled"),
        ({"data": b"x", "headers": {"Nats-TTL": "1s"}}, "per-message TTL is disabled"),
        ({"headers": {"Nats-Rollup": "all"}}, "rollup not permitted"),
        ({"headers": {"Nats-Rollup": "sub", "KV-Operation": "PURGE"}}, "rollup not permitted"),
    ],
)
@pytest.mark.usefixtures("small")
async def test_what_a_claim_must_not_be(raw: Stolen, said: dict[str, object], told: str) -> None:
    stolen = await raw("worker-a-n1")
    answer = await stolen.ask("$KV.claims_a.odd", **said)  # type: ignore[arg-type]
    assert told in answer["error"]["description"]


async def test_a_claim_is_written_once(raw: Stolen, small: LiveFabric) -> None:
    first, second = await raw("worker-a-n1"), await raw("worker-a-n2")
    assert "error" not in await first.ask("$KV.claims_a.once", b"first")
    for headers in (None, {"KV-Operation": "DEL"}, {"Nats-Expected-Last-Sequence": "1"}):
        assert "error" in await second.ask("$KV.claims_a.once", b"second", headers)
    provisioner = await small.connect("provisioner")
    assert (await dump(provisioner, "claims_a"))["once"].value == b"first"
    await provisioner.close()


@pytest.mark.parametrize("rollup", ["all", "sub"])
async def test_no_message_wipes_the_budgets(raw: Stolen, nats: LiveFabric, rollup: str) -> None:
    stolen, connection = await raw("gateway-g1"), await nats.connect("gateway-g2")
    bucket = NatsBucket(connection, subjects.BUDGETS_BUCKET)
    await bucket.write(f"kept.{rollup}", b"usage", 0)
    for headers in ({"Nats-Rollup": rollup}, {"Nats-Rollup": rollup, "KV-Operation": "PURGE"}, {"Nats-TTL": "1s"}):
        assert "error" in await stolen.ask("$KV.budgets.gateway-g1.zz", b"", headers)
        for subject in ("$KV.budgets.zz", f"$KV.budgets.kept.{rollup}", f"$KV.budgets.gateway-g2.kept.{rollup}"):
            stolen.publish(subject, b"", headers=headers)
            stolen.publish(subject, b"")
    await stolen.settle()
    assert len(stolen.errors) == 18
    entry = await bucket.read(f"kept.{rollup}")
    assert entry is not None
    assert entry.value == b"usage"
    await connection.close()


async def test_subscriptions_and_connections_have_an_end(raw: Stolen, nats: LiveFabric) -> None:
    stolen = await raw("worker-a-n1")
    for number in range(WORKER_SUBSCRIPTIONS + 100):
        stolen.say(b"SUB cancel.a.z%d %d\r\n" % (number, number))
    await stolen.settle()
    assert len(stolen.errors) == 100
    assert all("maximum subscriptions exceeded" in error for error in stolen.errors)
    most = accounts(nats.roles())[workers_account("a")]["limits"]["max_connections"]
    others = [stolen]
    with pytest.raises(ConnectionError):
        for _ in range(most + 1):
            others.append(await raw("worker-a-n1"))
    assert most - 10 <= len(others) <= most  # those of the tests before may not be gone yet
    honest = await nats.worker("b")  # another pool's
    await honest.close()


async def test_a_worker_sends_frames_and_nothing_larger(raw: Stolen) -> None:
    gateway = await raw("gateway-g1")
    gateway.say(b"SUB reply.*.g1.* 1\r\n")
    await gateway.settle()
    stolen = await raw("worker-a-n1")
    assert stolen.info["max_payload"] == layout.MAX_PAYLOAD
    stolen.publish("reply.a.g1.x", bytes(WORKER_PAYLOAD))
    await stolen.settle()
    stolen.publish("reply.a.g1.x", bytes(WORKER_PAYLOAD + 1))
    with pytest.raises(ConnectionError):
        await stolen.settle()
    assert [len(data) for _, data in await gateway.settle()] == [WORKER_PAYLOAD]


async def test_the_server_cannot_be_asked_for_less_than_its_buckets(tmp_path: Path) -> None:
    """Their room is reserved: where it is not there, nothing is provisioned, and it is said."""
    live = LiveFabric.make(tmp_path)
    live.server.configure(live.roles())
    path = tmp_path / "nats.conf"
    config = json.loads(path.read_text())
    config["jetstream"]["max_file_store"] = file_bytes(len(POOLS)) - 1
    path.write_text(json.dumps(config))
    live.process = live.server.start(live.log)
    try:
        with pytest.raises(FabricUnavailable, match="insufficient storage resources"):
            await live.provision()
    finally:
        live.stop()


def test_every_stream_has_bounds_that_fit_the_store() -> None:
    streams = layout.streams([f"p{number}" for number in range(50)], 1)
    for stream in streams:
        bounds = (stream.max_bytes, stream.max_msgs, stream.max_msg_size)
        assert all(bound is not None and bound > 0 for bound in bounds), stream.name
        assert stream.discard is DiscardPolicy.NEW
        assert stream.allow_rollup_hdrs is not True
    files = sum(stream.max_bytes or 0 for stream in streams if stream.storage is StorageType.FILE)
    assert files == file_bytes(50) <= MAX_FILES


def test_every_account_has_limits() -> None:
    live = LiveFabric.make(Path("unused"))
    found = configuration("127.0.0.1", 4222, "store", live.roles())["accounts"]
    assert all(min(account["limits"].values()) > 0 for account in found.values())


async def test_a_gateway_leaves_the_others_their_connections(raw: Stolen, nats: LiveFabric) -> None:
    most = accounts(nats.roles())[gateway_account("g1")]["limits"]["max_connections"]
    with pytest.raises(ConnectionError):
        for _ in range(most + 1):
            await raw("gateway-g1")
    other = await nats.gateway("g2")
    await other.close()


async def test_buckets_of_older_versions_are_made_anew_with_what_they_hold(tmp_path: Path) -> None:
    with LiveFabric.running(tmp_path) as live:
        provisioner = await live.connect("provisioner")
        for wanted in layout.streams(tuple(POOLS), 1):
            if wanted.storage is not StorageType.FILE:
                continue
            older = StreamConfig(
                name=wanted.name, subjects=wanted.subjects, max_age=wanted.max_age, storage=StorageType.FILE,
                discard=DiscardPolicy.NEW, max_msgs_per_subject=1, allow_direct=True, allow_rollup_hdrs=True,
                allow_msg_ttl=True, deny_delete=True,
            )  # fmt: skip
            if wanted.name == subjects.REVOCATIONS_STREAM:
                older = older.evolve(max_msgs_per_subject=-1, allow_rollup_hdrs=False, deny_purge=True)
            await provisioner.jetstream.add_stream(older)
        await provisioner.jetstream.publish("$KV.budgets.user.a.b", b"usage")
        await provisioner.jetstream.publish(subjects.revocation("A" * 43), b'{"until":9e9,"issued_until":null}')
        await provision(provisioner, POOLS)
        await provision(provisioner, POOLS)
        assert (await dump(provisioner, subjects.BUDGETS_BUCKET))["user.a.b"].value == b"usage"
        assert (await provisioner.jetstream.stream_info(subjects.REVOCATIONS_STREAM)).state.messages == 1
        assert not (await provisioner.jetstream.stream_info("KV_claims_a")).config.allow_msg_ttl
        await provisioner.close()


async def test_the_log_of_what_is_denied_has_an_end(tmp_path: Path) -> None:
    live = LiveFabric.make(tmp_path)
    live.server.configure(live.roles())
    path = tmp_path / "nats.conf"
    config = json.loads(path.read_text())
    assert (config["logfile_size_limit"], config["logfile_max_num"]) == (LOG_SIZE, LOGS)
    path.write_text(json.dumps({**config, "logfile_size_limit": 100_000}))
    live.process = live.server.start(live.log)
    try:
        stolen = await StolenNats.open(live.server.port, live.credentials["worker-a-n1"])
        for number in range(5000):
            stolen.publish(f"denied.{number}")
        await stolen.settle()
        await stolen.close()
        assert len(stolen.errors) == 5000
    finally:
        live.stop()
    written = log_sizes(tmp_path)
    assert 1 < len(written) <= LOGS + 1
    assert max(written) < 200_000


def log_sizes(folder: Path) -> list[int]:
    return [one.stat().st_size for one in folder.glob("nats.log*")]


def test_nobody_is_in_the_servers_own_account(tmp_path: Path) -> None:
    """What servers obey is said there, and an answer of theirs may be sent to any subject of the account that asked."""
    found = accounts(Site(tmp_path, {"a": ("m1",)}).roles())
    assert found[SYSTEM]["users"] == []
    assert [user["user"] for user in found[INSPECTION]["users"]] == ["inspector"]


async def test_a_worker_has_as_many_slots_as_subscriptions(nats: LiveFabric) -> None:
    with pytest.raises(SettingsError, match="at most 500"):
        await nats.worker("a", slots=MAX_SLOTS + 1)
