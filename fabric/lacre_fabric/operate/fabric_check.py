"""`lacre fabric check`: compares running NATS servers with Lacre's requirements.

Rules:
- It changes no one else's data. It writes one entry of its own into each stream, to test writes. Operations that should be
  denied are harmless if they are allowed: a subscription, a question, or a message without a receiver.
- `wrong` breaks one of Lacre's guarantees. `weak` breaks one as soon as something fails.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, Header, Placement, StorageType, StreamConfig, StreamInfo

from lacre.errors import LacreError
from lacre.jose.jws import b64u
from lacre.runtime.hosts import is_loopback
from lacre.runtime.json_objects import object_in
from lacre_fabric.nats import streams as layout
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.revocations import revoke
from lacre_fabric.nats.roles import INSPECT, Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.streams import MAX_PAYLOAD
from lacre_fabric.work.contract import FabricError
from lacre_fabric.work.revocations import Revocation

_SKEW: Final = 5.0  # seconds that clocks may differ without effect
_LISTEN: Final = 1.0  # seconds in which servers answer
_PROVISION: Final = "run `lacre manifest publish` to correct it"
_ANEW: Final = "delete the stream once its content is not needed, then run `lacre manifest publish`"
_ACCOUNTS: Final = "configure the servers with exactly what `lacre fabric accounts` prints"
_FULL: Final = "see docs/nats.md, The way back: a credential may be stolen"
_ELECTION: Final = "wait ten seconds, in which servers choose a leader; then check that most of them run and reach each other"
_NEARLY_FULL: Final = 0.8  # of a stream's bytes or messages
_PROBE: Final = 2  # seconds to live of the test entry, in a stream that supports it
_COPIED: Final = 5.0  # seconds in which each copy must have the test entry; a server that lives needs milliseconds
_AGAIN: Final = 0.2  # seconds until a copy that is behind is looked at again
_OFFLINE: Final = 10118  # JSStreamOfflineErr: all servers of the stream are known to be down
_FIXED: Final = frozenset({"storage", "retention"})  # fields that no update of a stream can change
_CHOSEN: Final = frozenset({"retention", "duplicate_window", "placement"})  # fields that the server chooses if none are given
_STREAM: Final = (
    "subjects", "retention", "storage", "num_replicas", "discard", "max_msgs", "max_bytes", "max_msgs_per_subject", "max_age",
    "duplicate_window", "allow_msg_ttl", "deny_delete", "deny_purge", "placement", "max_msg_size", "allow_rollup_hdrs",
    "discard_new_per_subject",
)  # fmt: skip
_LIMITS: Final = ((StorageType.MEMORY, "max_memory", "max_memory_store"), (StorageType.FILE, "max_storage", "max_file_store"))
_CONSUMER: Final = ("filter_subject", "ack_policy", "ack_wait", "max_deliver", "max_ack_pending")


class Severity(StrEnum):
    OK = "ok"
    WEAK = "weak"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class FabricFinding:
    """One result of the check. remedy: what to do; empty if nothing."""

    check: str
    verdict: Severity
    detail: str
    remedy: str = ""


async def inspect(
    servers: Servers,
    pools: Mapping[str, Sequence[str]],
    replicas: int,
    credentials: Mapping[str, Credential],
    regions: Sequence[str] = subjects.ONE_REGION,
) -> list[FabricFinding]:
    """credentials: by role: `provisioner`, `inspector`, and any of `gateway` and `worker-POOL`, the latter two optionally with
    `@REGION`.
    """
    found = [_tls(servers)]
    try:
        async with _connected(servers, credentials["provisioner"]) as provisioner:
            found += await _streams(provisioner, layout.streams(tuple(pools), replicas, regions))
            found += await _consumers(provisioner, layout.consumers(pools, regions))
    except LacreError as exc:
        found.append(
            FabricFinding(
                "fabric", Severity.WRONG, str(exc), "check that the servers run, have JetStream, and have Lacre's accounts"
            )
        )
        return found
    try:
        async with _connected(servers, credentials["inspector"]) as inspector:
            found += _servers(
                await server_reports(inspector), layout.streams(tuple(pools), replicas, regions), regions, time.time()
            )
    except LacreError as exc:
        found.append(FabricFinding("servers", Severity.WRONG, str(exc), _ACCOUNTS))
    for role, credential in credentials.items():
        if role not in ("provisioner", "inspector"):
            found.append(await _denied(servers, role, credential, [(pool, region) for pool in pools for region in regions]))
    return found


@asynccontextmanager
async def _connected(servers: Servers, credential: Credential) -> AsyncIterator[Connection]:
    connection = await Connection.open(servers, credential)
    try:
        yield connection
    finally:
        await connection.close()


def _tls(servers: Servers) -> FabricFinding:
    if servers.tls:
        return FabricFinding("tls", Severity.OK, "servers prove their identity")
    far = [host for host in servers.hosts if not is_loopback(host)]
    if not far:
        return FabricFinding("tls", Severity.OK, "no TLS, but only on this machine")
    return FabricFinding(
        "tls",
        Severity.WRONG,
        f"passwords go to {', '.join(far)} unencrypted",
        "configure `tls` on the servers, and write tls:// in `url`",
    )


async def _streams(connection: Connection, streams: Sequence[StreamConfig]) -> list[FabricFinding]:
    """First a test entry in each stream, then a look at the copies: NATS calls a lost copy current until it misses an entry."""
    found = {wanted.name or "": await _stream(connection, wanted) for wanted in streams}
    end = asyncio.get_running_loop().time() + _COPIED
    for wanted in streams:
        name = wanted.name or ""
        if found[name].verdict is Severity.OK and (wanted.num_replicas or 1) > 1:
            found[name] = await _copied(connection, name, end)
    return list(found.values())


async def _stream(connection: Connection, wanted: StreamConfig) -> FabricFinding:
    name = wanted.name or ""
    info = await _info(connection, name)
    if isinstance(info, FabricFinding):
        return info
    finding = _configured(name, wanted, info)
    if finding.verdict is Severity.WRONG:
        return finding
    return await _takes_writes(connection, name) or _room(name, info) or finding


async def _info(connection: Connection, name: str) -> StreamInfo | FabricFinding:
    """Other streams answer even if this one has no leader. Raises FabricUnavailable if JetStream does not work."""
    denials = connection.denials
    async with connection.mapped():
        try:
            info = await connection.jetstream.stream_info(name)
        except nats.js.errors.NotFoundError:
            return FabricFinding(name, Severity.WRONG, "missing", _PROVISION)
        except nats.js.errors.APIError as exc:
            if exc.err_code != _OFFLINE:
                raise
            return _no_leader(name)
        except TimeoutError:  # what a server says whose stream has no leader: nothing
            if connection.denials != denials or not connection.connected:
                raise
            return _no_leader(name)
    return info if info.cluster is None or info.cluster.leader else _no_leader(name)


def _no_leader(name: str) -> FabricFinding:
    return FabricFinding(name, Severity.WRONG, "no server leads it, so it takes no writes", _ELECTION)


async def _copied(connection: Connection, name: str, end: float) -> FabricFinding:
    """Waits until every copy has the test entry, until `end` of the loop's clock."""
    while True:
        info = await _info(connection, name)
        finding = info if isinstance(info, FabricFinding) else _copies(name, info)
        if finding.verdict is Severity.OK or asyncio.get_running_loop().time() >= end:
            return finding
        await asyncio.sleep(_AGAIN)


async def _takes_writes(connection: Connection, name: str) -> FabricFinding | None:
    """The fault that a test write finds, if any. A correct stream can still refuse writes: it or its disk may be full."""
    try:
        if name == subjects.REVOCATIONS_STREAM:
            await revoke(connection, Revocation(b64u(secrets.token_bytes(32)), time.time() + _PROBE))
        else:
            kind, _, rest = name.partition("_")
            place = f"{rest.rpartition('_')[0]}.{rest.rpartition('_')[2]}"
            headers = {Header.MSG_TTL.value: str(_PROBE)} if kind == "WORK" else None
            subject = f"work.{place}.{_NOBODY}" if kind == "WORK" else f"$KV.{rest}.{_NOBODY}-{secrets.token_hex(8)}"
            if rest in (subjects.TRUST_BUCKET, subjects.BUDGETS_BUCKET):
                subject = f"$KV.{rest}.{_NOBODY}"
            async with connection.mapped():
                await connection.jetstream.publish(subject, b"", headers=headers)
    except FabricError as exc:
        return FabricFinding(name, Severity.WRONG, f"it takes no writes: {exc}", _FULL)
    return None


def _room(name: str, info: StreamInfo) -> FabricFinding | None:
    state, config = info.state, info.config
    used = max(state.bytes / (config.max_bytes or 1), state.messages / (config.max_msgs or 1))
    if used < _NEARLY_FULL:
        return None
    return FabricFinding(name, Severity.WEAK, f"{used:.0%} of its limit is used", _FULL)


def _configured(name: str, wanted: StreamConfig, info: StreamInfo) -> FabricFinding:
    differs = _differences(_STREAM, wanted, info.config)
    if differs:
        remedy = _ANEW if any(field in _FIXED for field, _ in differs) else _PROVISION
        verdict = Severity.WEAK if {field for field, _ in differs} == {"num_replicas"} else Severity.WRONG
        return FabricFinding(name, verdict, "; ".join(told for _, told in differs), remedy)
    if wanted.placement is not None and (info.cluster is None or info.cluster.name != wanted.placement.cluster):
        there = "nowhere" if info.cluster is None else f"in {info.cluster.name}"
        remedy = f"it is moving to {wanted.placement.cluster}: check again later"
        return FabricFinding(name, Severity.WEAK, f"it is still {there}", remedy)
    return FabricFinding(name, Severity.OK, "correct, on one server")


def _copies(name: str, info: StreamInfo) -> FabricFinding:
    """Of a stream that has a leader and several copies."""
    leader, peers = (None, []) if info.cluster is None else (info.cluster.leader, info.cluster.replicas or [])
    late = [peer.name or "?" for peer in peers if peer.offline or not peer.current]
    if late:
        told = f"leader {leader}; behind or offline: {', '.join(sorted(late))}"
        return FabricFinding(name, Severity.WEAK, told, "check that every server runs and reaches the others")
    if len(peers) < (info.config.num_replicas or 1) - 1:
        told = f"only {len(peers) + 1} of {info.config.num_replicas} copies have a server"
        return FabricFinding(name, Severity.WEAK, told, "check that every server runs and reaches the others")
    return FabricFinding(name, Severity.OK, f"correct, leader {leader}, {len(peers)} more current")


def _differences(fields: Iterable[str], wanted: object, there: object) -> list[tuple[str, str]]:
    """The fields that differ, each with its message. If the server chooses a field, any value is fine."""
    told = []
    for field in fields:
        want, has = _limit(getattr(wanted, field)), _limit(getattr(there, field))
        if want != has and not (want is None and field in _CHOSEN):
            told.append((field, f"{field} is {has}, should be {want}"))
    return told


def _limit(value: object) -> object:
    """None for None, zero, minus one and false: NATS and its client write "no limit" in these ways. For a placement, its
    region.
    """
    if isinstance(value, Placement):
        return value.cluster
    return None if value in (None, 0, -1, False) else value


async def _consumers(connection: Connection, consumers: Mapping[str, Sequence[ConsumerConfig]]) -> list[FabricFinding]:
    found = []
    for stream, wanted in consumers.items():
        try:
            async with connection.mapped():
                there = {info.name: info.config for info in await connection.jetstream.consumers_info(stream)}
        except FabricError as exc:
            found.append(FabricFinding(f"consumers {stream}", Severity.WRONG, str(exc), _PROVISION))
            continue
        names = {config.durable_name or "": config for config in wanted}
        told = [f"{name} is missing" for name in names.keys() - there.keys()]
        told += [f"unexpected consumer {name}: delete it" for name in there.keys() - names.keys()]
        for name in names.keys() & there.keys():
            told += [f"{name}: {text}" for _, text in _differences(_CONSUMER, names[name], there[name])]
        verdict = Severity.WRONG if told else Severity.OK
        found.append(
            FabricFinding(f"consumers {stream}", verdict, "; ".join(told) or f"{len(names)}", _PROVISION if told else "")
        )
    return found


async def server_reports(inspector: Connection) -> list[dict[str, Any]]:
    """Each server's answer about its configuration (VARZ). Raises FabricError."""
    said: list[dict[str, Any]] = []

    async def hear(message: Msg) -> None:
        answer = object_in(message.data)
        if answer is not None and "data" in answer:
            said.append({**answer["data"], "at": answer["server"]["time"]})

    inbox = f"{subjects.inbox(inspector.credential.name)}.servers"
    async with inspector.mapped(confirmed=True):
        await inspector.client.subscribe(inbox, cb=hear)
        await inspector.client.publish(INSPECT[0], reply=inbox)
    await asyncio.sleep(_LISTEN)
    return said


def _servers(
    said: Sequence[Mapping[str, Any]], streams: Sequence[StreamConfig], regions: Sequence[str], now: float
) -> list[FabricFinding]:
    if not said:
        return [FabricFinding("servers", Severity.WRONG, "no server answers the inspector", _ACCOUNTS)]
    found = []
    versions = sorted({str(server["version"]) for server in said})
    verdict = Severity.OK if len(versions) == 1 else Severity.WEAK
    found.append(
        FabricFinding(
            "versions", verdict, ", ".join(versions), "" if len(versions) == 1 else "run the same version on all servers"
        )
    )
    if len(regions) > 1:
        found.append(_majority(said, regions))
    for region in regions:
        there = [server for server in said if len(regions) == 1 or _cluster(server) == region]
        kept = [stream for stream in streams if stream.placement is None or stream.placement.cluster == region]
        found.append(_enough(region, len(there), max(stream.num_replicas or 1 for stream in kept), regions))
        for server in there:
            found += _server(server, kept, now)
    return found


def _cluster(server: Mapping[str, Any]) -> str | None:
    name = (server.get("cluster") or {}).get("name")
    return None if name is None else str(name)


def _majority(said: Sequence[Mapping[str, Any]], regions: Sequence[str]) -> FabricFinding:
    """Whether most servers remain after the loss of any region but the home. Without a majority JetStream does not answer."""
    needing = [region for region in regions[1:] if 2 * sum(_cluster(server) != region for server in said) <= len(said)]
    if not needing:
        return FabricFinding(
            "majority", Severity.OK, f"most of the {len(said)} servers remain if any region but the home is lost"
        )
    told = f"if {' or '.join(needing)} is lost, most of the {len(said)} servers are gone and JetStream stops"
    return FabricFinding(
        "majority", Severity.WEAK, told, "run a server without storage in another place, or more servers in the home"
    )


def _enough(region: str, there: int, replicas: int, regions: Sequence[str]) -> FabricFinding:
    check = "servers" if len(regions) == 1 else f"servers {region}"
    told = f"{there} servers answer; each stream needs {replicas}"
    if there >= replicas:
        return FabricFinding(check, Severity.OK, told)
    return FabricFinding(check, Severity.WRONG, told, "start the servers that are missing, or lower `replicas`")


def _server(server: Mapping[str, Any], kept: Sequence[StreamConfig], now: float) -> list[FabricFinding]:
    """kept: the streams that it may have to store; any server can get any stream of its region."""
    name, config = server.get("server_name", "?"), (server.get("jetstream") or {}).get("config") or {}
    wrong: list[tuple[Severity, str, str]] = []
    if server.get("max_payload", 0) < MAX_PAYLOAD:
        wrong.append(
            (Severity.WRONG, f"max_payload is {server.get('max_payload')}", f"set max_payload to {MAX_PAYLOAD} or more")
        )
    if not config:
        wrong.append((Severity.WRONG, "JetStream is off", "configure `jetstream`"))
    else:
        if not config.get("sync_always"):
            told = "a power cut may lose the last writes"
            wrong.append((Severity.WEAK, told, "set sync_interval: always in `jetstream`"))
        for storage, limit, setting in _LIMITS:
            needed = sum(_most(stream) for stream in kept if stream.storage == storage)
            if 0 <= config.get(limit, -1) < needed:
                told = f"{setting} is {config[limit]}, its streams may need {needed}"
                wrong.append((Severity.WRONG, told, f"set {setting} in `jetstream` to {needed} or more"))
    skew = abs(now - datetime.fromisoformat(str(server["at"])).timestamp())
    if skew > _SKEW:
        wrong.append((Severity.WEAK, f"its clock differs by {skew:.0f} s", "synchronize all clocks with NTP"))
    if not wrong:
        return [FabricFinding(f"server {name}", Severity.OK, "JetStream, its limits, payload, sync and clock are correct")]
    return [FabricFinding(f"server {name}", *each) for each in wrong]


def _most(stream: StreamConfig) -> int:
    """Bytes that a stream may need, if it has a limit."""
    if stream.max_bytes and stream.max_bytes > 0:
        return stream.max_bytes
    return max(0, stream.max_msgs or 0) * max(0, stream.max_msg_size or 0)


async def _denied(servers: Servers, role: str, credential: Credential, places: Sequence[tuple[str, str]]) -> FabricFinding:
    """Tests operations that the role must not be allowed."""
    allowed = []
    try:
        async with _connected(servers, credential) as connection:
            for subject in _LISTENED:
                if not await _refuses(connection, subject, listen=True):
                    allowed.append(f"subscribe to {subject}")
            for subject in _asked(role, places):
                if not await _refuses(connection, subject, listen=False):
                    allowed.append(f"publish to {subject}")
    except LacreError as exc:
        return FabricFinding(f"permissions {role}", Severity.WRONG, str(exc), _ACCOUNTS)
    if allowed:
        return FabricFinding(f"permissions {role}", Severity.WRONG, f"it may {', '.join(allowed)}", _ACCOUNTS)
    return FabricFinding(f"permissions {role}", Severity.OK, "forbidden operations are denied")


_LISTENED: Final = (">", "_INBOX.>", "work.>", "$SYS.>", "$KV.>")
_NOBODY: Final = "check-nobody"  # no stream, consumer, gateway or request has this name


def _asked(role: str, places: Sequence[tuple[str, str]]) -> list[str]:
    """Subjects that must be denied to the role; they reach nothing if they are allowed. places: pools and regions."""
    api = [f"{prefix}.{call}" for prefix in ("$JS.API", subjects.API) for call in (
        f"STREAM.CREATE.{_NOBODY}", f"STREAM.DELETE.{_NOBODY}", f"STREAM.PURGE.{_NOBODY}", "STREAM.NAMES",
        f"CONSUMER.CREATE.{_NOBODY}.{_NOBODY}",
    )]  # fmt: skip
    kind, _, own = role.partition("-")
    pool, _, region = own.partition("@")
    others = [place for place in places if place != (pool, region or subjects.DEFAULT_REGION)]
    pulls = [f"{subjects.API}.CONSUMER.MSG.NEXT.{subjects.work_stream(*place)}.{_NOBODY}" for place in others]
    replies = [subjects.reply(other, _NOBODY, _NOBODY) for other in dict.fromkeys(at for at, _ in places) if other != pool]
    if kind == "worker":
        works = [f"work.{pool}.{region or subjects.DEFAULT_REGION}.{_NOBODY}.none"]
        return [*api, *pulls, *replies, *works, subjects.READ_BUDGETS, subjects.READ_REVOCATIONS]
    return [*api, *pulls, *replies]


async def _refuses(connection: Connection, subject: str, *, listen: bool) -> bool:
    denials = connection.denials
    try:
        if listen:
            subscription = await connection.client.subscribe(subject)
            await connection.round_trip()
            await subscription.unsubscribe()
        else:
            await connection.client.publish(subject, b"")
            await connection.round_trip()
    except nats.errors.Error as exc:
        raise connection.unavailable(exc, denials) from exc
    return connection.denials > denials
