"""The formats in which two versions meet: a member that a later version added is ignored, and a later version is refused."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import functools
import io
import json
import re
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.errors import InvalidMessage, NewerFormat, SettingsError
from lacre.evidence import receipts
from lacre.evidence.receipts import Receipt
from lacre.jose import jws
from lacre.jose.claims import Members
from lacre.jose.formats import MEMBER, Format
from lacre.trust.manifest import Document, Manifest, RootStatement
from lacre.trust.manifest_store import VersionFile, accept
from lacre_fabric.nats import orders, streams, subjects
from lacre_fabric.nats.gateway import GATEWAY, GRANT, REQUEST
from lacre_fabric.operate.backup import Backup
from lacre_fabric.operate.site import Site
from lacre_fabric.settings import NatsServers, parse
from lacre_fabric.work import drain_orders, grants
from lacre_fabric.work.contract import WorkerLost
from lacre_fabric.work.drain_orders import DrainOrder
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.grants import Grant
from lacre_fabric.work.presence import Presence
from lacre_fabric.work.revocations import Revocation, StoreMark, token_key
from lacre_gateway.audit import entries
from lacre_gateway.audit.entries import Event
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record, Share, Window
from parts import trust
from parts.fabric import LiveFabric, Parties, answer, new_work, read, sealed_bytes
from parts.versions import PACKAGES, ROOT
from parts.waiting import until

KEY = Ed25519PrivateKey.generate()
PUBLIC = jws.raw_public_key(KEY)
NOW = trust.NOW
STRANGE = {"of_a_later_version": {"a": [1, None]}}
HEX = "0" * 32


def as_json(parsed: Callable[[bytes], object]) -> Callable[[Path, dict[str, Any]], object]:
    return lambda _folder, members: parsed(json.dumps(members).encode())


def signed(verify: Callable[[str], object], typ: str) -> Callable[[Path, dict[str, Any]], object]:
    return lambda _folder, members: verify(jws.sign(members, KEY, typ))


def as_members(parsed: Callable[[Members], object]) -> Callable[[Path, dict[str, Any]], object]:
    return lambda _folder, members: parsed(Members(members, "it"))


def of_site(folder: Path, members: dict[str, Any]) -> object:
    (folder / "site.json").write_text(json.dumps(members))
    return Site.load(folder)


def of_settings(folder: Path, members: dict[str, Any]) -> object:
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in members.items() if name not in STRANGE)
    return parse(NatsServers, text, folder / "worker.toml")


def of_memory(folder: Path, members: dict[str, Any]) -> object:
    (folder / "seen.json").write_text(json.dumps([members]))
    return VersionFile(folder).seen()


def of_backup(_folder: Path, members: dict[str, Any]) -> object:
    if MEMBER in members:
        members = {**members, "format": members[MEMBER]}
    about, packed = json.dumps(members).encode(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo("backup.json")
        entry.size = len(about)
        archive.addfile(entry, io.BytesIO(about))
    return Backup.parse(packed.getvalue())


def of_frame(_folder: Path, members: dict[str, Any]) -> object:
    lines = [f"{name.upper()}: {value}" for name, value in members.items()]
    return Frame.read("\r\n".join(["NATS/1.0", *lines, "", ""]).encode(), b"x")


def remembered(folder: Path) -> dict[str, Any]:
    accept(trust.document(), trust.PINNED, VersionFile(folder), NOW)
    [found] = json.loads((folder / "seen.json").read_bytes())
    return dict(found)


GRANTED = Grant("id", NOW, NOW + 60, "a", "m1", "chat", "none", 10, 100, (), ("A" * 22, "B" * 22), "x")
RECORD = Record("acme/ann", {LimitKind.TOKENS_PER_DAY: {7: Window({"g1": Share(9, 3)})}})
# How each format is read from its members, and the members.
CASES: dict[str, tuple[Callable[[Path, dict[str, Any]], object], dict[str, Any]]] = {
    "manifest document": (as_json(Document.parse), json.loads(trust.document())),
    "root statement": (
        as_members(RootStatement.parse),
        json.loads(RootStatement(PUBLIC, NOW).payload()),
    ),
    "manifest": (as_members(Manifest.parse), trust.manifest().members()),
    "remembered manifest": (of_memory, {}),  # made in the test
    "grant": (signed(lambda token: Grant.verify(token, [PUBLIC], NOW), grants.TYP), GRANTED.members()),
    "worker order": (
        signed(lambda token: DrainOrder.verify(token, [PUBLIC], NOW), drain_orders.TYP),
        DrainOrder(HEX, NOW, NOW + 30, "a", "lacre", "n1", True).members(),
    ),
    "receipt": (
        signed(lambda token: Receipt.verify(token, PUBLIC), receipts.TYP),
        Receipt("x", "sha256:0", 1, 0, 2, NOW, NOW + 1, True).members(),
    ),
    "frame": (of_frame, {"a": HEX, "s": 0, "k": "usage", "m": "f" * 64}),
    "presence": (as_json(Presence.parse), {"models": ["m"], "free": 1, "busy": 0}),
    "revocation": (as_json(Revocation.parse), json.loads(Revocation(token_key("i", "j"), NOW).encode())),
    "mark of the stores": (as_json(StoreMark.parse), json.loads(StoreMark(("budgets",), NOW).encode())),
    "budget record": (as_json(Record.parse), json.loads(RECORD.encode())),
    "audit entry": (
        lambda _folder, members: {
            name: value for name, value in entries.parse(json.dumps(members).encode()).items() if name not in (*STRANGE, MEMBER)
        },
        json.loads(entries.encode(Event(time=1.0, event="started"))[0]),
    ),
    "state folder": (of_site, {"pools": {"default": ["m"]}, "nats": "nats://127.0.0.1:1", "gateway": "http://127.0.0.1:1"}),
    "settings file": (of_settings, {"url": "nats://127.0.0.1:4222"}),
    "backup": (of_backup, {"format": 1, "made_at": 1.0, "version": "0.1.0", "fabric": False}),
}
ON_NATS = {"work", "NATS layout"}  # tested with a server


@functools.cache
def in_the_code() -> dict[str, int]:
    """Every format that the sources define, with its version."""
    found: dict[str, int] = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder / package).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "= Format(" in text else ():
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Format":
                    name, *rest = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                    assert name not in found, f"{path} defines a second format {name}"
                    found[name] = next((each for each in rest if isinstance(each, int)), 1)
    return found


def in_the_docs() -> dict[str, int]:
    text = (ROOT / "docs" / "upgrades.md").read_text()
    rows = re.findall(r"^\| ([a-zA-Z ]+?) \| (\d+) \| .+ \| .+ \| .+ \|$", text, re.MULTILINE)
    return {name: int(version) for name, version in rows}


def test_the_docs_list_every_format() -> None:
    assert in_the_docs() == in_the_code() and len(in_the_code()) > 15


def test_every_format_is_tried_here() -> None:
    assert CASES.keys() | ON_NATS == in_the_code().keys()


@pytest.mark.parametrize("name", CASES)
def test_what_a_later_version_adds(name: str, tmp_path: Path) -> None:
    """A further member changes nothing, and version 1 may be said."""
    read_as, members = CASES[name]
    members = members or remembered(tmp_path)
    plain = read_as(tmp_path, members)
    assert read_as(tmp_path, {**members, **STRANGE}) == plain
    assert read_as(tmp_path, {**members, MEMBER: 1}) == plain


@pytest.mark.parametrize("name", CASES)
def test_a_later_version(name: str, tmp_path: Path) -> None:
    read_as, members = CASES[name]
    members = members or remembered(tmp_path)
    version = in_the_code()[name] + 1
    with pytest.raises((NewerFormat, SettingsError), match=f"version {version} of its format.*upgrade this"):
        read_as(tmp_path, {**members, MEMBER: version})


@pytest.mark.parametrize("version", ["2", 0, -1, 1.5, True, None, [1]])
def test_a_version_that_is_none(version: object) -> None:
    with pytest.raises(InvalidMessage, match="'v' must be the version"):
        Format("grant", "worker").check({MEMBER: version})


@pytest.mark.parametrize("version", ["", "0", "-1", "1.5", "x", "1" * 10])
def test_a_header_that_is_no_version(version: str) -> None:
    with pytest.raises(InvalidMessage, match="header V must be the version"):
        Format("frame", "gateway").check_header(version)


def test_limits_of_a_kind_that_a_later_version_added() -> None:
    """The other limits count: else this gateway would take the whole budget for unused."""
    members = json.loads(RECORD.encode())
    members["kinds"]["tokens_per_century"] = {"1": {"settled": 1, "shares": {}}}
    assert Record.parse(json.dumps(members).encode()) == RECORD


def test_entries_of_a_kind_that_a_later_version_added() -> None:
    """A gateway goes on with such a log; who checks it is told to use the newer version."""
    entry = json.dumps({"kind": "miracle", "time": 1.0}).encode()
    assert entries.parse(entry)["kind"] == "miracle"
    with pytest.raises(NewerFormat, match="upgrade the program that verifies"):
        entries.parse_known(entry)


# On a server


@pytest.fixture
async def parties(tmp_path: Path) -> AsyncIterator[Parties]:
    with LiveFabric.running(tmp_path) as live:
        await live.provision()
        async with Parties.of(live) as parties:
            yield parties


async def test_work(parties: Parties) -> None:
    """A worker takes work with a further header. It returns work of a later version, for a worker that is upgraded.

    No other worker is here, so it gets this work again, and rejects it.
    """
    worker, connection, replies = await parties.worker(), await parties.connect("gateway-g1"), []

    async def kept(message: Any) -> None:
        replies.append(Frame.parse(message.headers, message.data))

    await connection.client.subscribe(subjects.reply("a", "g1", HEX), cb=kept)
    headers = {GRANT: "x", REQUEST: HEX, GATEWAY: "g1", orders.KEY: HEX}
    at = subjects.work("a", subjects.DEFAULT_REGION, "m1")
    await connection.jetstream.publish(at, sealed_bytes(), headers={**headers, "V": "2"})
    await connection.jetstream.publish(at, sealed_bytes(), headers={**headers, "V": "1", "Later": "x"})
    delivery = await worker.pull()
    await delivery.drop()
    worker.release(delivery)
    coming = asyncio.create_task(worker.pull())
    await until(lambda: replies)
    coming.cancel()
    await asyncio.wait([coming])
    assert [frame.payload.decode() for frame in replies] == [problems.BUSY.type]


async def test_the_key_for_macs(parties: Parties) -> None:
    """Work carries it to those that know it. Work and frames without one are those of N-1, and stay valid."""
    gateway, worker = await parties.gateway(), await parties.worker()
    for settlement, mac in (("a-sealed-key", b"m" * 32), ("", b"")):
        dispatch = await gateway.dispatch(dataclasses.replace(new_work("a"), settlement=settlement))
        delivery = await worker.pull()
        assert (delivery.work.settlement, delivery.work.gateway) == (settlement, "g1")
        assert await delivery.claim()
        await delivery.send(FrameKind.USAGE, b"receipt", mac)
        assert (await dispatch.next()).payload == b"receipt"
        assert [frame.mac for frame in dispatch.receipts] == [mac]
        await delivery.drop()
        worker.release(delivery)


async def test_a_frame_and_presence(parties: Parties) -> None:
    """A gateway does not wait for a worker that it cannot understand, and hears the others."""
    gateway, stranger = await parties.gateway(), await parties.connect("worker-a-n2")
    worker = await parties.worker()
    work = new_work("a")
    later = json.dumps({"models": ["m1"], "free": 1, "busy": 0, MEMBER: 2}).encode()
    await stranger.client.publish(subjects.presence("a", subjects.DEFAULT_REGION, "n2"), later)
    dispatch = await gateway.dispatch(work)
    frame = {"A": HEX, "S": "0", "K": "data", "V": "2"}
    await stranger.client.publish(subjects.reply("a", "g1", work.request_id), b"x", headers=frame)
    with pytest.raises(WorkerLost, match="upgrade this gateway"):
        await read(dispatch)
    assert gateway.workers("a", "m1") == 1
    dispatch = await gateway.dispatch(new_work("a"))  # the first was withdrawn
    await answer(worker)
    assert await read(dispatch) == [b"x", b"receipt"]


async def test_the_layout(parties: Parties) -> None:
    """A command leaves a later version's layout as it is."""
    connection = await parties.connect()
    [trust_bucket] = (config for config in streams.streams(("a",), 1) if config.name == f"KV_{subjects.TRUST_BUCKET}")
    await connection.jetstream.update_stream(trust_bucket.evolve(metadata={streams.LAYOUT_OF: "2", "of another": "x"}))
    with pytest.raises(NewerFormat, match="upgrade this command"):
        await parties.live.provision()
    await connection.jetstream.update_stream(trust_bucket.evolve(metadata={"of another": "x"}))
    await parties.live.provision()
