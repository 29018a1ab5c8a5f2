"""Checks this machine: the audit log's folder, the certificate, the port, the limit of open files."""

from __future__ import annotations

import errno
import resource
import shlex
import shutil
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509

from lacre.errors import SettingsError
from lacre_gateway.doctor.findings import Findings
from lacre_gateway.http.certificate import tls_context
from lacre_gateway.http.server import OTHER_FILES, bind
from lacre_gateway.settings import GatewaySettings, Listen, Tls

_LITTLE: Final = 64 * 2**20  # bytes free: some 60,000 requests
_ENOUGH: Final = 2 * 2**30
_SOON: Final = timedelta(days=14)


def check(settings: GatewaySettings, findings: Findings) -> None:
    for number in range(settings.processes):
        own = settings if settings.processes == 1 else settings.for_process(number, settings.listen.port)
        _audit(own.audit, findings)
    _port(settings.listen, findings)
    _open_files(settings.listen, findings)
    if settings.listen.tls is not None:
        _tls(settings.listen.tls, urlsplit(settings.public_url).hostname or "", findings)
    elif settings.public_url.startswith("https:"):
        findings.warn(
            "tls", "public_url is https, and the gateway itself serves plain HTTP",
            "put a TLS proxy in front of it, or set listen.tls",
        )  # fmt: skip


def _audit(folder: Path, findings: Findings) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as exc:
        told = f"{existing} cannot be written ({exc.strerror})"
        findings.failed("audit", told, "free space, or let the gateway's user write there")
        return
    free = shutil.disk_usage(existing).free
    told = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < _LITTLE:
        findings.failed("audit", told, "free space: a gateway that cannot record serves nothing")
    elif free < _ENOUGH:
        findings.warn("audit", told, "free space soon: an entry takes about half a KiB, a request two entries")
    else:
        findings.ok("audit", told)


def _port(listen: Listen, findings: Findings) -> None:
    at = f"{listen.host}:{listen.port}"
    try:
        bind(listen).close()
    except SettingsError as exc:
        cause = exc.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            findings.warn("port", f"{at} is taken", "none if this gateway is running; otherwise free the port")
        else:
            findings.failed("port", str(exc), "name an address of this machine in listen.host")
    else:
        findings.ok("port", f"{at} is free")


def _open_files(listen: Listen, findings: Findings) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = listen.connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        remedy = f"raise the limit (LimitNOFILE={wanted} with systemd), or lower listen.connections"
        findings.warn("open files", f"at most {hard}: fewer than listen.connections needs", remedy)
    else:
        findings.ok("open files", f"enough for {listen.connections} connections")


def _tls(tls: Tls, host: str, findings: Findings) -> None:
    try:
        tls_context(tls)
        certificate = x509.load_pem_x509_certificates(tls.certificate.read_bytes())[0]
    except (SettingsError, OSError, ValueError) as exc:
        findings.failed("tls", str(exc), "put a PEM certificate with its chain, and its key with mode 0600, in these files")
        return
    if tls.key.stat().st_mode & 0o040:
        findings.warn("tls", f"{tls.key} can be read by its group", f"chmod 600 {shlex.quote(str(tls.key))}")
    until, now = certificate.not_valid_after_utc, datetime.now(UTC)
    told = f"{tls.certificate}: for {', '.join(_names(certificate)) or 'no name'}, until {until:%Y-%m-%d %H:%M} UTC"
    if not certificate.not_valid_before_utc <= now < until:
        findings.failed("tls", told, "renew the certificate: a running gateway takes the new files by itself")
    elif not _is_for(certificate, host):
        findings.failed("tls", told, f"get a certificate for {host}, the host of public_url")
    elif until - now < _SOON:
        findings.warn("tls", told, "renew the certificate: a running gateway takes the new files by itself")
    else:
        findings.ok("tls", told)


def _names(certificate: x509.Certificate) -> list[str]:
    with suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return []


def _is_for(certificate: x509.Certificate, host: str) -> bool:
    """By the names alone; clients judge the signature. A wildcard stands for one label (RFC 9525 section 6.3)."""
    wild = f"*.{host.partition('.')[2]}"
    return any(name.lower() in (host.lower(), wild.lower()) for name in _names(certificate))
