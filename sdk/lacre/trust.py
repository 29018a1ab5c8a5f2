"""Is it trusted? Decides from bytes and a clock value that it is given, and raises; it fetches and stores nothing.

Rules:
- The pinned root (Ed25519) signs only statements: which key signs manifests, until when, and which root comes next.
- A change of root is one payload signed by the old and the new root. A client follows the chain from the root it pinned.
- The signer signs the manifest. That versions only rise, and statements are never taken back, is `lacre.lineage`'s to see.
- A clock correction that a peer suggested never reaches the comparison with an expiry.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from lacre.errors import Expired, InvalidMessage, InvalidSignature, SettingsError, UntrustedRoot
from lacre.jws import b64u, b64u_decode
from lacre.jws import verify as verify_jws
from lacre.manifest import KEY_BYTES, MANIFEST_TYP, ROOT_TYP, Document, Manifest, RootStatement
from lacre.members import Members

MAX_FUTURE: Final = 300.0  # seconds that a manifest's `iat` may lie ahead of this clock


@dataclass(frozen=True, slots=True)
class ConnectionString:
    """`lacre://host[:port]?trust=<base64url root>`: where the gateway is, and the root key that the application pins."""

    base_url: str
    root: bytes

    @classmethod
    def parse(cls, text: str) -> ConnectionString:
        """Raises SettingsError. `lacre://` means TLS; `lacre+http://` is accepted for loopback addresses only."""
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise SettingsError("the connection string is not a URL: copy it again from `lacre up` or your operator") from exc
        schemes = {"lacre": "https", "lacre+http": "http"}
        if parts.scheme not in schemes or not host:
            raise SettingsError("a connection string has the form lacre://host[:port]?trust=ROOT")
        if parts.username is not None or parts.path not in ("", "/") or parts.fragment:
            raise SettingsError("a connection string has a host, a port and ?trust=, and no user, path or fragment")
        if schemes[parts.scheme] == "http" and not is_loopback(host):
            raise SettingsError("lacre+http:// is for loopback addresses only: use lacre:// (TLS)")
        pins = parse_qs(parts.query).get("trust", [])
        if len(pins) != 1:
            raise SettingsError("the connection string needs one ?trust= with the root key that this application pins")
        try:
            root = b64u_decode(pins[0])
        except InvalidMessage as exc:
            raise SettingsError("?trust= in the connection string is not base64url: copy it whole") from exc
        if len(root) != KEY_BYTES:
            raise SettingsError(f"?trust= in the connection string must hold {KEY_BYTES} bytes: copy it whole")
        authority = f"[{host}]" if ":" in host else host
        return cls(f"{schemes[parts.scheme]}://{authority}{f':{port}' if port is not None else ''}", root)

    def __str__(self) -> str:
        scheme, _, authority = self.base_url.partition("://")
        return f"{'lacre' if scheme == 'https' else 'lacre+http'}://{authority}?trust={b64u(self.root)}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name alone: nothing is resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Step:
    """A root statement that was followed, and the root that stands after it: the next one, where it hands over."""

    root: bytes
    statement: RootStatement


@dataclass(frozen=True, slots=True)
class Trusted:
    """A manifest that verified, and what it verified with.

    roots: the pinned root and every root that the chain led to; together the *lineage* that versions are remembered for.
    steps: the statements on the way, the last of which names the signer.
    document: the bytes that it came from, so that they can be kept.
    """

    manifest: Manifest
    roots: tuple[bytes, ...]
    steps: tuple[Step, ...]
    token: str
    document: bytes


def verify(document: bytes, root: bytes, now: float) -> Trusted:
    """Follows the chain from the pinned `root` to the signer, and the signer to the manifest. now: seconds since the epoch.

    Raises InvalidMessage, MessageTooLarge, UntrustedRoot, InvalidSignature or Expired.
    """
    parsed = Document.parse(document)
    steps = follow(parsed.roots, root)
    statement = steps[-1].statement
    if now >= statement.expires_at:
        raise Expired("the signer's time is over: the operator must run `lacre signer rotate`")
    manifest = Manifest.parse(Members(verify_jws(parsed.manifest, statement.signer, MANIFEST_TYP), "the manifest"))
    if now >= manifest.expires_at:
        raise Expired("the manifest has expired: the operator must run `lacre manifest publish`, or this clock is wrong")
    if manifest.issued_at > now + MAX_FUTURE:
        raise Expired("the manifest is not valid yet: this machine's clock is behind")
    roots = dict.fromkeys((root, *(step.root for step in steps)))
    return Trusted(manifest, tuple(roots), steps, parsed.manifest, document)


def follow(chain: Sequence[Sequence[str]], pinned: bytes) -> tuple[Step, ...]:
    """The statements from the pinned root on; there is at least one. Those before its first are others' history.

    Raises UntrustedRoot or InvalidMessage.
    """
    root = pinned
    steps: list[Step] = []
    for entry in chain:
        statement = _verified_by(entry, root)
        if statement is None:
            if not steps:
                continue
            raise UntrustedRoot("the chain of root statements has a gap: a statement is not signed by the root before it")
        if statement.next_root is not None and statement.next_root != root:
            # Both roots sign the same bytes: the old one hands over, the new one accepts.
            payloads = {token.split(".")[1] for token in entry}
            if len(payloads) != 1 or _verified_by(entry, statement.next_root) is None:
                raise UntrustedRoot("a change of root is not signed by the new root")
            root = statement.next_root
        steps.append(Step(root, statement))
    if not steps:
        raise UntrustedRoot("no root statement is signed by the pinned root: wrong gateway, or the pin is from elsewhere")
    return tuple(steps)


def _verified_by(entry: Sequence[str], root: bytes) -> RootStatement | None:
    """The statement in `entry` if one of its signatures is by `root`."""
    for token in entry:
        try:
            return RootStatement.parse(Members(verify_jws(token, root, ROOT_TYP), "a root statement"))
        except InvalidSignature:
            continue
    return None
