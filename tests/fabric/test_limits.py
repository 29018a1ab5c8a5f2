"""What one credential may take of the message server: no bucket, account or message without a bound, and no bucket wiped."""

from __future__ import annotations

from pathlib import Path

import pytest
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from lacre.errors import SettingsError
from lacre_fabric.nats import revocations, subjects
from lacre_fabric.nats import streams as layout
from lacre_fabric.nats.accounts import WORKER_PAYLOAD, accounts
from lacre_fabric.nats.kv import dump
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import INSPECTION, MAX_SLOTS, SYSTEM
from lacre_fabric.nats.streams import BucketLimits
from lacre_fabric.operate.nats_server import LOG_SIZE, LOGS, MAX_FILES, configuration
from lacre_fabric.operate.site import Site
from lacre_fabric.work.contract import FabricUnavailable
from parts.fabric import POOLS, LiveFabric, Parties

SMALL = BucketLimits(64 * 1024, 100, 512)
NEVER = {"Nats-TTL": "never"}


def file_bytes(pools: int) -> int:
    """What the buckets of so many pools may come to on each server: `max_file_store` must not be less."""
    return layout.TRUST.size + layout.BUDGETS.size + revocations.MAX_BYTES + pools * layout.CLAIMS.size


async def test_a_claim_has_a_largest_size(parties: Parties) -> None:
    stolen = await parties.stolen("worker-a-n1")
    for size, refused in ((layout.CLAIMS.largest, False), (layout.CLAIMS.largest + 1, True)):
        answer = await stolen.ask(f"$KV.claims_a.odd{size}", bytes(size))
        assert ("message size exceeds maximum allowed" in str(answer)) == refused


async def test_a_worker_sends_frames_and_nothing_larger(parties: Parties) -> None:
    gateway, stolen = await parties.stolen("gateway-g1"), await parties.stolen("worker-a-n1")
    gateway.say(b"SUB reply.*.g1.* 1\r\n")
    await gateway.settle()
    stolen.publish("reply.a.g1.x", bytes(WORKER_PAYLOAD))
    await stolen.settle()
    stolen.publish("reply.a.g1.x", bytes(WORKER_PAYLOAD + 1))
    with pytest.raises(ConnectionError):
        await stolen.settle()
    assert [len(data) for _, data in await gateway.settle()] == [WORKER_PAYLOAD]


async def test_the_server_cannot_be_asked_for_less_than_its_buckets(tmp_path: Path) -> None:
    """Their room is reserved: where it is not there, nothing is provisioned, and it is said."""
    less = {"max_file_store": file_bytes(len(POOLS)) - 1}
    with LiveFabric.running(tmp_path, change=lambda config: config["jetstream"].update(less)) as live:
        with pytest.raises(FabricUnavailable, match="insufficient storage resources"):
            await live.provision()


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
    def smaller(config: dict[str, object]) -> None:
        assert (config["logfile_size_limit"], config["logfile_max_num"]) == (LOG_SIZE, LOGS)
        config["logfile_size_limit"] = 100_000

    with LiveFabric.running(tmp_path, change=smaller) as live:
        async with Parties.of(live) as parties:
            stolen = await parties.stolen("worker-a-n1")
            for number in range(5000):
                stolen.publish(f"denied.{number}")
            await stolen.settle()
            assert len(stolen.errors) == 5000
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
