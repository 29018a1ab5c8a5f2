"""Checks the fabric: the connection, the manifest, queues, workers, revocations, and its clock.

It connects with the gateway's credential, and does not subscribe to replies: those belong to the running gateway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import nats.js.errors

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.jose.jws import raw_public_key
from lacre.trust.chain import verify
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import VersionFile
from lacre_fabric.keys.secret_files import read_ed25519s
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.contract import PRESENT_FOR, FabricError, FabricUnavailable
from lacre_fabric.work.presence import MAX_NODES, wrong_in
from lacre_gateway.doctor.findings import Findings
from lacre_gateway.settings import GatewaySettings

_AHEAD: Final = 5.0  # seconds that clocks may differ without harm
_FAR: Final = 60.0  # seconds at which workers and gateways begin to refuse grants and tokens
_HOUR: Final = 3600.0


async def check(settings: GatewaySettings, findings: Findings) -> None:
    try:
        connection = await Connection.open(settings.nats.servers, Credential.load(settings.nats.credentials))
    except LacreError as exc:
        findings.failed("fabric", str(exc), "check that NATS runs there, and that it knows the credential in nats.credentials")
        findings.skipped("manifest, queues, workers, clock", "the fabric is needed first")
        return
    try:
        findings.ok("fabric", f"connected to {connection.address} as {connection.credential.name}")
        manifest = await _manifest(settings, connection, findings)
        if manifest is not None:
            await _queues(connection, manifest, settings.nats.region, findings)
            await _workers(connection, manifest, settings.nats.region, findings)
    finally:
        await connection.close()


async def _manifest(settings: GatewaySettings, connection: Connection, findings: Findings) -> Manifest | None:
    remedy = "publish one with `lacre manifest publish`"
    try:
        document = await connection.manifest()
        if document is None:
            findings.failed("manifest", "none was published", remedy)
            return None
        manifest = verify(document, settings.root, time.time()).manifest
    except FabricError as exc:
        findings.failed(
            "manifest", str(exc), "provision the fabric again: the credential does not have a gateway's permissions"
        )
        return None
    except LacreError as exc:
        findings.failed("manifest", f"it does not verify: {exc}", f"compare `trust` with the published root; {remedy}")
        return None
    left = manifest.expires_at - time.time()
    told = f"version {manifest.version}, for another {left / _HOUR:.1f} hours"
    if left < _HOUR:
        findings.warn("manifest", told, remedy)
    else:
        findings.ok("manifest", told)
    _remembered(settings, manifest, findings)
    _signing_key(settings, manifest, findings)
    return manifest


def _remembered(settings: GatewaySettings, manifest: Manifest, findings: Findings) -> None:
    """Compares the fabric with what the gateway's processes remember: they ignore an older manifest until theirs expires."""
    for number in range(settings.processes):
        own = settings if settings.processes == 1 else settings.for_process(number, settings.listen.port)
        if own.memory is None:
            findings.skipped("memory", "`memory` is not set: a restarted gateway would accept an older manifest")
            return
        try:
            versions = [seen.version for seen in VersionFile(own.memory).seen() if settings.root in seen.roots]
        except SettingsError as exc:
            findings.failed("memory", str(exc), "remove the file if you know why it is damaged")
            continue
        newest = max(versions, default=0)
        if newest > manifest.version:
            findings.failed(
                "memory", f"{own.instance} has seen version {newest}, and ignores version {manifest.version} of the fabric",
                "the publisher's state folder is an old copy: see docs/rotation.md, After a restore",
            )  # fmt: skip
        else:
            findings.ok("memory", f"{own.instance} has seen no newer manifest")


def _signing_key(settings: GatewaySettings, manifest: Manifest, findings: Findings) -> None:
    try:
        ours = set(map(raw_public_key, read_ed25519s(settings.signing_key)))
    except LacreError:
        findings.skipped("grants", "signing_key is needed first")
        return
    if manifest.gateway_key in ours:
        findings.ok("grants", "the manifest names the key that this gateway signs with")
    elif ours & set(manifest.gateway_keys):
        findings.warn(
            "grants", "the manifest names a newer key than signing_key has; the old one still counts for some time",
            "copy the publisher's gateway/grant.pem to signing_key",
        )  # fmt: skip
    else:
        findings.failed(
            "grants", "the manifest names another key than signing_key, so workers will refuse every grant",
            "give this gateway the key that the manifest names, or publish a manifest with this one",
        )  # fmt: skip


async def _queues(connection: Connection, manifest: Manifest, region: str, findings: Findings) -> None:
    """The queues of the gateway's own region."""
    for pool in manifest.pools:
        try:
            said = await _info(connection, subjects.work_stream(pool, region))
        except FabricError as exc:
            remedy = "`lacre manifest publish` creates missing queues; a denial means that the credential is not for this pool"
            findings.failed(f"queue {pool}", str(exc), remedy)
            continue
        findings.ok(f"queue {pool}", f"{said['state']['messages']} waiting")
        _clock(said, findings)


async def _info(connection: Connection, queue: str) -> dict[str, Any]:
    """JetStream's state of a pool's queue, with its own time. Raises FabricUnavailable."""
    async with connection.mapped():
        try:
            return dict(await connection.ask(f"STREAM.INFO.{queue}", {}))
        except nats.js.errors.NotFoundError as exc:
            raise FabricUnavailable("NATS has no such queue") from exc


def _clock(said: dict[str, Any], findings: Findings) -> None:
    """Reported once: NATS has one clock."""
    stamp = said.get("ts")
    if not isinstance(stamp, str) or any(finding.check == "clock" for finding in findings.found):
        return
    ahead = time.time() - datetime.fromisoformat(stamp).timestamp()
    told = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the message server's"
    remedy = "synchronise both clocks by NTP: tokens, grants and requests carry times"
    if abs(ahead) > _FAR:
        findings.failed("clock", told, remedy)
    elif abs(ahead) > _AHEAD:
        findings.warn("clock", told, remedy)
    else:
        findings.ok("clock", told)


async def _workers(connection: Connection, manifest: Manifest, own: str, findings: Findings) -> None:
    heard: dict[str, dict[str, frozenset[str]]] = {pool: {} for pool in manifest.pools}  # the faults of each worker

    def hear(subject: str, _block: bytes, payload: bytes) -> bool:
        try:
            pool, region, node = subjects.parse_presence(subject)
            name, wrong = node if region == own else f"{region}/{node}", wrong_in(payload)
        except InvalidMessage:
            return False
        if pool not in heard or (name not in heard[pool] and len(heard[pool]) >= MAX_NODES):
            return False
        heard[pool][name] = wrong
        return True

    try:
        async with connection.mapped(confirmed=True):
            await connection.client.subscribe_directly("presence.>", hear)
    except FabricError as exc:
        findings.failed("workers", str(exc), "provision the fabric again: the credential does not have a gateway's permissions")
        return
    deadline = time.monotonic() + PRESENT_FOR
    while time.monotonic() < deadline and not all(heard[pool] for pool in manifest.pools):
        await asyncio.sleep(0.05)
    for pool in manifest.pools:
        if heard[pool]:
            _told(pool, heard[pool], findings)
        else:
            findings.warn(
                f"workers {pool}", "no worker was found", "start one with `lacre worker`: callers get a 503 until then"
            )


def _told(pool: str, heard: Mapping[str, frozenset[str]], findings: Findings) -> None:
    """The result for the workers of one pool. heard: the faults of each, in its own words."""
    wrong = [f"{name} ({', '.join(sorted(kinds))})" for name, kinds in sorted(heard.items()) if kinds]
    told = f"{len(heard)} heard of: {', '.join(sorted(heard))}"
    remedy = "read their logs, or run `lacre worker check --settings FILE` on their machines"
    if not wrong:
        findings.ok(f"workers {pool}", told)
    elif len(wrong) < len(heard):
        findings.warn(f"workers {pool}", f"{told}; not ready: {', '.join(wrong)}", remedy)
    else:
        findings.failed(f"workers {pool}", f"none is ready: {', '.join(wrong)}", remedy)
