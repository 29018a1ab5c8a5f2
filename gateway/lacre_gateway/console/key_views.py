"""The public keys in use with their ages, and the audit log's state. No private key is near: the gateway has only its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509

from lacre.evidence.checkpoints import verifier_key
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Manifest, fingerprint
from lacre.wire.header import Kem
from lacre_fabric.work.presence import accepts_grants_of
from lacre_gateway.admin.api import AdminCaller
from lacre_gateway.audit import series
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.export import Exporter
from lacre_gateway.audit.feed import read
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.console.key_holders import LivePools, rotations, unlisted
from lacre_gateway.console.log_reading import read_log
from lacre_gateway.console.reports import AuditReport, IssuerReport, KeyReport, KeysReport, VerifiedReport
from lacre_gateway.gateway import Gateway
from lacre_gateway.policy.question import AdminAction

_SHOWN: Final = 16  # characters of a key


@dataclass(frozen=True, slots=True)
class KeyViews:
    """root: of the audit logs. verifying: one verification at a time."""

    root: Path
    verifying: asyncio.Lock

    async def keys(self, asking: AdminCaller) -> KeysReport:
        gateway = await asking.may(AdminAction.USAGE)
        manifest = gateway.feed.manifest if gateway.feed.ready else None
        live = LivePools({} if gateway.fabric is None else gateway.fabric.seen())
        keys = [] if manifest is None else list(_of_manifest(manifest, live, gateway.clock()))
        keys += await asyncio.to_thread(_certificates, gateway)
        signs = raw_public_key(gateway.key)
        return KeysReport(
            gateway=gateway.settings.instance, signs=b64u(signs)[:_SHOWN],
            version=None if manifest is None else manifest.version, issued_at=None if manifest is None else manifest.issued_at,
            expires_at=None if manifest is None else manifest.expires_at, keys=keys,
            issuers=[IssuerReport(issuer=one.issuer, usable=one.keys.usable) for one in gateway.authenticator.issuers],
            unlisted=() if manifest is None else tuple(unlisted(manifest, live)),
            rotations=() if manifest is None else tuple(rotations(manifest, live, signs, gateway.clock())),
        )  # fmt: skip

    async def audit(self, asking: AdminCaller) -> AuditReport:
        gateway = await asking.may(AdminAction.AUDIT)
        audit = gateway.audit
        note, logs = await read_log(self._newest, audit.public)
        return AuditReport(
            origin=audit.origin, entries=audit.size, logs=logs, writable=audit.writable, checkpoint=note,
            key=verifier_key(audit.origin, audit.public),
        )  # fmt: skip

    async def verify(self, asking: AdminCaller) -> VerifiedReport:
        """Every byte of the logs."""
        gateway = await asking.may(AdminAction.AUDIT)
        async with self.verifying:
            began = time.monotonic()
            found = await read_log(verify, self.root, gateway.audit.public)
            return VerifiedReport(
                holds=found.wrong is None, words=found.words, entries=found.size, requests=found.requests,
                under_way=found.under_way, logs=found.logs, erased=found.erased, seconds=round(time.monotonic() - began, 3),
            )  # fmt: skip

    async def export(self, asking: AdminCaller) -> Iterator[bytes]:
        """All entries, a line of JSON each. To be read in another thread."""
        await asking.may(AdminAction.AUDIT)
        return self._lines()

    def _lines(self) -> Iterator[bytes]:
        exporter = Exporter("jsonl")
        for entry in read(self.root, None, alone=True):
            if entry is None:
                return
            for line in exporter.lines(entry):
                yield line.encode() + b"\n"

    def _newest(self, public: bytes) -> tuple[str, int]:
        number = series.newest(self.root)
        return LogReader(series.place(self.root, number), public).note.decode(), number


def _of_manifest(manifest: Manifest, live: LivePools, now: float) -> Iterator[KeyReport]:
    for name, pool in sorted(manifest.pools.items()):
        seen: set[str] = set()
        for key in pool.keys:  # the newest first
            suite = Kem(key.config.kem).label
            state = "expired" if key.not_after <= now else "older generation" if suite in seen else "newest"
            seen.add(suite)
            have, lack = live.holders(name, fingerprint(key.config))
            yield KeyReport(
                what="pool", of=name, key=f"{key.config.key_id}: {fingerprint(key.config)}", suite=suite, state=state,
                until=key.not_after, held=len(have), missing=() if state == "expired" else tuple(lack),
            )  # fmt: skip
        yield KeyReport(
            what="receipts", of=name, key=b64u(pool.receipt_key)[:_SHOWN], suite="Ed25519", state="in use", until=None
        )
        for past in pool.past_receipts:
            yield KeyReport(
                what="receipts", of=name, key=b64u(past.key)[:_SHOWN], suite="Ed25519", state="past", until=past.until
            )
    for place, public in enumerate(manifest.gateway_keys):
        state = "in use" if place == 0 else "also accepted: a rotation is under way"
        have, lack = live.holders(None, accepts_grants_of(public))
        yield KeyReport(
            what="grants", of="gateways", key=b64u(public)[:_SHOWN], suite="Ed25519", state=state, until=None, held=len(have),
            missing=tuple(lack),
        )  # fmt: skip


def _certificates(gateway: Gateway) -> list[KeyReport]:
    """The gateway's own; none if it serves plain HTTP, or the file cannot be read now."""
    tls = gateway.settings.listen.tls
    if tls is None:
        return []
    try:
        found = x509.load_pem_x509_certificates(tls.certificate.read_bytes())
    except (OSError, ValueError):
        return [KeyReport(what="certificate", of="listener", key="", suite="", state="its file cannot be read now", until=None)]
    now = gateway.clock()
    return [
        KeyReport(
            what="certificate", of="its chain" if place else "listener", key=f"{one.serial_number:x}"[:_SHOWN], suite="X.509",
            state="expired" if one.not_valid_after_utc.timestamp() <= now else "in use",
            until=one.not_valid_after_utc.timestamp(),
        ) for place, one in enumerate(found)
    ]  # fmt: skip
