"""What each role must not be able to do is tried, and denied by nats-server itself; what it must be able to do works."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from lacre.errors import SettingsError
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import publish_manifest
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.frames import Frame, FrameKind
from parts.fabric import GATEWAYS, POOLS, LiveFabric, Parties, answer, new_work, read

ANYBODY = Credential.new("x")
ID = "0123456789abcdef" * 2
M1 = subjects.model_token("m1")
NEXT = f"CONSUMER.MSG.NEXT.WORK_a_lacre.model-{M1}"
ONE = b'{"batch":1,"expires":1000000000}'
API = ("$JS.API", subjects.API)
STREAM_CALLS = ("UPDATE", "DELETE", "PURGE", "INFO", "MSG.GET", "MSG.DELETE")
# What tells which streams, consumers, subjects and connections there are.
LISTS = [
    *(f"{api}.{call}" for api in API for call in ("INFO", "STREAM.NAMES", "STREAM.LIST")),
    *(f"{api}.CONSUMER.{call}.WORK_{pool}_lacre" for api in API for call in ("NAMES", "LIST") for pool in POOLS),
    *(f"$SYS.REQ.SERVER.PING{what}" for what in ("", ".SUBSZ", ".CONNZ", ".JSZ", ".ACCOUNTZ")),
    *(
        f"$SYS.REQ.ACCOUNT.{account}.{what}"
        for account in (roles.FABRIC, *map(roles.gateway_account, GATEWAYS), *map(roles.workers_account, POOLS))
        for what in ("SUBSZ", "CONNZ", "INFO")
    ),
]


async def is_denied(connection: Connection, attempt: Awaitable[object]) -> bool:
    """Whether the server said so; the round trip makes sure that it had the time to."""
    denials = connection.denials
    await attempt
    await connection.round_trip()
    return connection.denials > denials


async def hear(connection: Connection, subject: str) -> list[Msg]:
    """The list that what comes on `subject` is added to."""
    heard: list[Msg] = []

    async def take(message: Msg) -> None:
        heard.append(message)

    await connection.client.subscribe(subject, cb=take)
    await connection.round_trip()
    return heard


async def state(provisioner: Connection) -> dict[str, tuple[int, int, int]]:
    """Of every stream and bucket: messages, the last sequence, consumers."""
    streams = await provisioner.jetstream.streams_info()
    return {info.config.name or "": (info.state.messages, info.state.last_seq, info.state.consumer_count) for info in streams}


QUEUES = [f"WORK_{pool}_lacre" for pool in POOLS]


def of_both_apis(*calls: str) -> list[str]:
    return [f"{api}.{call}" for api in API for call in calls]


NOT_FOR_WORKERS = [
    *of_both_apis(NEXT, "STREAM.CREATE.MINE", "STREAM.INFO.KV_claims_b"),
    *of_both_apis(*(f"STREAM.{call}.{stream}" for call in STREAM_CALLS for stream in (*QUEUES, "KV_claims_a"))),
    *of_both_apis(*(f"STREAM.{call}.KV_claims_b" for call in ("UPDATE", "DELETE", "PURGE", "MSG.DELETE"))),
    *of_both_apis(*(f"DIRECT.GET.{queue}" for queue in QUEUES), *(f"CONSUMER.INFO.{queue}.model-{M1}" for queue in QUEUES)),
    *of_both_apis(*(f"CONSUMER.{how}CREATE.{queue}.mine" for how in ("", "DURABLE.") for queue in QUEUES)),
    *of_both_apis(*(f"{call}.GET.{subjects.REVOCATIONS_STREAM}" for call in ("DIRECT", "STREAM.MSG"))),
    *(f"{subjects.API}.DIRECT.GET.{held}" for held in ("KV_budgets.$KV.budgets.user.a.b", f"KV_claims_a.$KV.claims_a.{ID}")),
    *LISTS,
    *(f"$JS.ACK.WORK_a_lacre.model-{M1}.1.1.1.1.0", f"reply.a.g1.{ID}", *(f"work.{pool}.lacre.{M1}" for pool in POOLS)),
    *(f"$KV.claims_a.{ID}", "$KV.trust.manifest", "$KV.budgets.user.a.b", subjects.revocation("x")),
    *(f"{order}.{pool}.{ID}" for order in ("cancel", "credit") for pool in POOLS),
    *(f"presence.{node}" for node in ("a.lacre.n1", "a.lacre.n9", "b.lacre.n2", "a.n1")),
    "_INBOX_worker-a-n1.x",
]
OF_ALL = [f"KV_{bucket}" for bucket in ("trust", "claims_a", "revocations", "budgets")]
NOT_FOR_GATEWAYS = [
    *of_both_apis(NEXT, "STREAM.CREATE.MINE", "CONSUMER.CREATE.WORK_a_lacre.mine"),
    *of_both_apis(*(f"STREAM.{call}.WORK_a_lacre" for call in ("UPDATE", "DELETE", "PURGE", "MSG.GET"))),
    *of_both_apis(*(f"STREAM.{call}.{bucket}" for bucket in OF_ALL for call in ("DELETE", "MSG.DELETE"))),
    *(f"{subjects.API}.DIRECT.GET.{held}" for held in (subjects.REVOCATIONS_STREAM, "KV_budgets.$KV.budgets.user.a.b")),
    *LISTS,
    *(f"$JS.ACK.WORK_a_lacre.model-{M1}.1.1.1.1.0", f"reply.a.g1.{ID}", f"$KV.claims_a.{ID}", "$KV.trust.manifest"),
    *(subjects.revocation(writer) for writer in ("x", "gateway-g1", "provisioner")),
    *(f"$KV.budgets.{key}" for key in ("x", "user.a.b", "gateway-g1.user.a.b", "gateway-g2")),
    *("presence.a.lacre.n1", "_INBOX_gateway-g1.x", "_INBOX_worker-a-n1.x"),
]
# What nobody but the colleague that it concerns may say, in one's own pool either.
NOT_FOR_COLLEAGUES = [f"cancel.a.{ID}", f"credit.a.{ID}", "presence.a.lacre.n1", "presence.a.lacre.n9", "$KV.trust.manifest"]
NOT_HEARD_BY = {
    "worker-b-n1": [
        "reply.a.>", "reply.b.>", "work.>", "cancel.a.*", "credit.a.*", "presence.>", "_INBOX.>", "_INBOX_worker-a-n1.>",
        "_INBOX_worker-b-n2.>", "_INBOX_gateway-g1.>", "$KV.>", "$JS.>", "$SYS.>", ">", "*.a.g1.*",
    ],
    "gateway-g2": [
        "reply.a.>", "reply.*.g1.*", "reply.>", "_INBOX_gateway-g1.>", "_INBOX.>", "work.>", "$KV.>", "cancel.>", ">",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "denied"),
    [("worker-b-n1", NOT_FOR_WORKERS), ("worker-a-n2", NOT_FOR_COLLEAGUES), ("gateway-g2", NOT_FOR_GATEWAYS)],
)
async def test_publishing_is_denied_and_changes_nothing(parties: Parties, role: str, denied: list[str]) -> None:
    provisioner, who = await parties.connect("provisioner"), await parties.connect(role)
    before = await state(provisioner)
    reply = f"_INBOX_{role}.answer"
    answers = await hear(who, f"{reply}.*")
    for number, subject in enumerate(denied):
        attempt = who.client.publish(subject, b"{}", reply=f"{reply}.{number}")
        assert await is_denied(who, attempt), subject
    assert not answers
    assert await state(provisioner) == before


@pytest.mark.parametrize("role", NOT_HEARD_BY)
async def test_subscribing_is_denied(parties: Parties, role: str) -> None:
    who = await parties.connect(role)
    for subject in NOT_HEARD_BY[role]:
        assert await is_denied(who, hear(who, subject)), subject


@pytest.mark.parametrize(
    ("role", "publish", "subscribe"),
    [
        ("worker-b-n1", ["reply.b.g1.x", "presence.b.lacre.n1", f"$KV.claims_b.{ID}"], ["cancel.b.*", "credit.b.*"]),
        ("gateway-g2", [f"work.a.lacre.{M1}", "cancel.b.x", "credit.a.x"], ["reply.*.g2.*", "presence.>"]),
    ],
)
async def test_its_own_is_allowed(parties: Parties, role: str, publish: list[str], subscribe: list[str]) -> None:
    """Else the denials above would prove nothing."""
    provisioner, who = await parties.connect("provisioner"), await parties.connect(role)
    for subject in publish:
        assert not await is_denied(who, who.client.publish(subject, b"{}")), subject
    for subject in [*subscribe, f"_INBOX_{role}.>"]:
        assert not await is_denied(who, hear(who, subject)), subject
    document = secrets.token_bytes(40)
    await publish_manifest(provisioner, document)
    assert await who.manifest() == document


async def test_frames_in_the_name_of_another_pool_are_not_heeded(parties: Parties) -> None:
    """NATS lets a worker answer any request id in its own pool's name."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    intruder = await parties.connect("worker-b-n1")
    dispatch = await gateway.dispatch(work := new_work("a"))
    forged = Frame("f" * 32, 0, FrameKind.DATA, b"forged")
    forging = intruder.client.publish(f"reply.b.g1.{work.request_id}", forged.payload, headers=forged.headers())
    assert not await is_denied(intruder, forging)
    assert await answer(worker, b"true") == work
    assert await read(dispatch) == [b"true", b"receipt"]


@pytest.mark.parametrize(
    "connect",
    [
        lambda live, url: NatsWorker.connect(url, live.credentials["worker-b-n1"], "a", "n1", ["m1"]),
        lambda live, url: NatsWorker.connect(url, live.credentials["worker-b-n1"], "b", "n2", ["m1"]),
        lambda live, url: NatsGateway.connect(url, live.credentials["gateway-g2"], "g1"),
        lambda live, url: NatsGateway.connect(url, live.credentials["worker-a-n1"], "g1"),
    ],
    ids=["another pool", "another node", "another gateway", "another role"],
)
async def test_a_denial_is_said(nats: LiveFabric, connect: Callable[[LiveFabric, str], Awaitable[object]]) -> None:
    with pytest.raises(FabricUnavailable, match=r"denies (worker|gateway)-.*permissions violation for (publish|subscription)"):
        await connect(nats, nats.server.url)


async def test_each_denied_call_is_said(parties: Parties) -> None:
    """The second like the first, and not those that were not denied."""
    worker = await parties.connect("worker-a-n1")
    for _ in range(2):
        with pytest.raises(FabricUnavailable, match=r"denies worker-a-n1 .*\$kv.trust.manifest"):
            async with worker.mapped():
                await worker.jetstream.publish("$KV.trust.manifest", b"", timeout=0.2)
        with pytest.raises(FabricUnavailable, match="no service on NATS answers"):
            async with worker.mapped():
                await worker.client.request("presence.a.lacre.n1", b"", timeout=0.2)
    await worker.manifest()


async def test_a_denied_pull_and_a_denied_claim_are_said(parties: Parties) -> None:
    """And may be asked again."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    await gateway.dispatch(new_work("a"))
    delivery = await worker.pull()
    worker.claims_of = "b"
    with pytest.raises(FabricUnavailable, match="denies worker-a-n1"):
        await delivery.claim()
    worker.claims_of = "a"
    assert await delivery.claim()
    await delivery.drop()
    worker.release()
    worker._queues[0].pull = await worker.connection.jetstream.pull_subscribe_bind(subjects.consumer("m1"), "WORK_b_lacre")
    with pytest.raises(FabricUnavailable, match=r"denies worker-a-n1 .*work_b"):
        await worker.pull()


async def test_a_wrong_password_and_no_server_are_said_at_once(nats: LiveFabric, unused_port: int) -> None:
    async with asyncio.timeout(10):
        for name in ("worker-a-n1", "nobody"):
            with pytest.raises(FabricUnavailable, match=f"as {name}: 'Authorization Violation'"):
                await Connection.open(nats.server.url, Credential(name, "wrong"))
        with pytest.raises(FabricUnavailable, match="cannot connect to NATS"):
            await Connection.open(f"nats://127.0.0.1:{unused_port}", ANYBODY)


# Between accounts


TARGETS = ["$KV.trust.manifest", "presence.a.lacre.n9", f"work.a.lacre.{M1}"]
TARGETS += [f"{prefix}.{ID}" for prefix in ("reply.a.g1", "cancel.a", "$KV.claims_a")]
CALLS = [f"$JS.API.STREAM.PURGE.{name}" for name in ("WORK_a_lacre", "KV_trust")] + ["$JS.API.STREAM.CREATE.MINE"]


@pytest.mark.parametrize("role", ["worker-b-n1", "gateway-g2"])
async def test_answers_go_to_who_asked(parties: Parties, role: str) -> None:
    """NATS lets a client name any subject for the answer: JetStream must not be made to speak for it there."""
    gateway, worker = await parties.gateway(), await parties.worker("a")
    await gateway.dispatch(new_work("a"))
    await worker.pull()
    inbound = gateway._side("a").add(ID, 1.0).inbound
    provisioner, who = await parties.connect("provisioner"), await parties.connect(role)
    await publish_manifest(provisioner, b"genuine")
    heard = await hear(provisioner, ">")
    before = await state(provisioner)
    config = json.dumps({"name": "MINE", "subjects": ["mine"]}).encode()
    headers = Frame("f" * 32, 0, FrameKind.DATA, b"").headers()
    stored, said = {  # what is acked, and what is answered
        "worker-b-n1": (
            ["$KV.claims_b.mine"],
            {
                f"{subjects.API}.DIRECT.GET.KV_claims_b.$KV.claims_b.mine": b"",
                f"{subjects.API}.CONSUMER.MSG.NEXT.WORK_b_lacre.model-{M1}": b'{"no_wait":true}',  # the status of a pull
            },
        ),
        "gateway-g2": (
            [f"work.b.lacre.{M1}", subjects.revocation(role), f"$KV.budgets.{role}.x"],
            {
                subjects.READ_REVOCATIONS: b'{"last_by_subj":"$KV.revocations.*"}',
                subjects.READ_BUDGETS: b'{"last_by_subj":"$KV.budgets.*.x"}',
            },
        ),
    }[role]
    for target in [*TARGETS, *CALLS]:
        for subject in stored:
            await who.client.publish(subject, config, headers=headers, reply=target)
        for subject, asked in said.items():
            await who.client.publish(subject, asked, reply=target)
    await who.round_trip()
    await asyncio.sleep(0.2)
    assert not who.denials
    assert not {message.subject for message in heard} & {*TARGETS, *CALLS}
    after = await state(provisioner)
    written = dict.fromkeys(("KV_claims_b", "KV_revocations", "KV_budgets", "WORK_b_lacre"), ())
    assert {**after, **written} == {**before, **written}
    assert after != before, "what it may write was written"
    assert await who.manifest() == b"genuine"
    assert not inbound.started
    assert gateway.workers("a", "m1") == 1


async def test_accounts_hold_without_permissions(tmp_path: Path) -> None:
    """A worker that may publish and read whatever there is finds, in its account, its own pool and no other."""

    def widened(role: Role) -> Role:
        return replace(role, publish=(">",), subscribe=(">",)) if role.credential.name == "worker-b-n1" else role

    async with AsyncExitStack() as stack:
        live = stack.enter_context(LiveFabric.running(tmp_path, as_role=widened))
        parties = Parties(stack, live)
        await live.provision()
        provisioner, intruder = await parties.connect("provisioner"), await parties.connect("worker-b-n1")
        gateway, worker = await parties.gateway(), await parties.worker("a")

        async def of_others() -> dict[str, tuple[int, int, int]]:
            found = await state(provisioner)
            return {name: held for name, held in found.items() if "_b" not in name and name != "WORK_a_lacre"}

        before = await of_others()
        heard = await hear(intruder, ">")
        dispatch = await gateway.dispatch(work := new_work("a"))
        for subject in NOT_FOR_WORKERS:
            await intruder.client.publish(subject, b"{}" if "CREATE" in subject else b"", reply="_INBOX_worker-b-n1.x")
        await intruder.round_trip()
        assert await answer(worker) == work
        assert await read(dispatch) == [b"x", b"receipt"]
        await asyncio.sleep(0.1)
        assert not intruder.denials
        # It hears itself; of the others, nothing.
        assert not [message for message in heard if work.request_id in message.subject or work.sealed in message.data]
        told = b"".join(message.data for message in heard if message.subject == "_INBOX_worker-b-n1.x")
        assert b"JetStream not enabled for account" in told
        assert not any(name in told for name in (b"WORK_a_lacre", b"claims_a", M1.encode()))
        assert await of_others() == {**before, "KV_claims_a": (1, 1, 0)}, "the worker's claim"


NAMED: dict[str, Callable[[str], Role]] = {
    "pool": lambda name: roles.worker(ANYBODY, name, "n1"),
    "node": lambda name: roles.worker(ANYBODY, "a", name),
    "gateway": lambda name: roles.gateway(ANYBODY, name, ["a"]),
    "gateway's pool": lambda name: roles.gateway(ANYBODY, "g1", [name]),
    "credential": lambda name: roles.worker(Credential.new(name), "a", "n1"),
}


@pytest.mark.parametrize("what", NAMED)
def test_names_reach_into_no_subject(what: str) -> None:
    for name in ("*", ">", "a.b", "", "a b", *(() if what == "credential" else ("A", "a" * 64))):
        with pytest.raises(SettingsError):
            NAMED[what](name)


def test_two_roles_share_no_credential() -> None:
    """`worker-a-b-n1` is node n1 of pool a-b, and node b-n1 of pool a."""
    credential = Credential.new("worker-a-b-n1")
    with pytest.raises(SettingsError, match="same name"):
        accounts([roles.worker(credential, "a-b", "n1"), roles.worker(credential, "a", "b-n1")])
