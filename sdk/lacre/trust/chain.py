"""Is it trusted? Decides from bytes and a clock value, and raises; it fetches and stores nothing.

Rules:
- The pinned root (Ed25519) signs only statements: which key signs manifests, until when, and which root comes next.
- A change of root is one payload signed by the old and the new root. A client follows the chain from the root it pinned.
- The signer signs the manifest. `lacre.trust.rollback` checks that versions only rise and that statements are never removed.
- The server of a document may be hostile. The work that it can cause here is bounded, however long the chain is.
- A clock correction that a peer suggested is never used to check an expiry.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from lacre.errors import Expired, InvalidMessage, InvalidSignature, MessageTooLarge, SettingsError, UntrustedRoot
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, b64u_decode, read_object
from lacre.jose.jws import verify as verify_jws
from lacre.runtime import arguments
from lacre.runtime.hosts import checked_host, is_loopback
from lacre.trust.manifest import KEY_BYTES, MANIFEST_TYP, ROOT_TYP, Document, Manifest, RootStatement

_VISIBLE: Final = re.compile(r"[^\s\x00-\x1f\x7f]*")
MAX_FUTURE: Final = 300.0  # seconds that a manifest's `iat` may be ahead of this clock
# Ours have 400 characters. The server chooses the chain's bytes, and each signature check hashes them.
MAX_STATEMENT: Final = 4096
# Statements of other roots that are checked in search of the pinned root's first statement: 0.1 ms each. An honest chain was
# only ever extended and needs none: there, the first statement names the pinned root.
MAX_FOREIGN: Final = 32
MAX_CLAIMS: Final = 4  # statements that name one root as the next; an honest chain has one
MAX_HANDOVERS: Final = 32  # changes of root to follow back; more than an operator makes while a client is away

Entry = tuple[str, ...]  # one statement: a JWS, or two of the same payload where the root changes


@dataclass(frozen=True, slots=True)
class ConnectionString:
    """`lacre://host[:port]?trust=<base64url root>`: the gateway's address, and the root key that the application pins."""

    base_url: str
    root: bytes

    @classmethod
    def parse(cls, text: str) -> ConnectionString:
        """Raises SettingsError. `lacre://` means TLS; `lacre+http://` is accepted for loopback addresses only."""
        arguments.instance(text, str, "the connection string")
        if not _VISIBLE.fullmatch(text.strip()):  # `urlsplit` leaves out line breaks and tabs, wherever they are
            raise SettingsError("a connection string has no white space and no control characters: copy it whole")
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise SettingsError("the connection string is not a URL: copy it again from `lacre up` or your operator") from exc
        schemes = {"lacre": "https", "lacre+http": "http"}
        if parts.scheme not in schemes or not host:
            raise SettingsError("a connection string has the form lacre://host[:port]?trust=ROOT")
        if parts.username is not None or parts.path not in ("", "/") or "#" in text:
            raise SettingsError("a connection string has a host, a port and ?trust=, and no user, path or fragment")
        if schemes[parts.scheme] == "http" and not is_loopback(host):
            raise SettingsError("lacre+http:// is for loopback addresses only: use lacre:// (TLS)")
        pins = parse_qs(parts.query, keep_blank_values=True).get("trust", [])
        if len(pins) != 1:
            raise SettingsError("the connection string needs one ?trust= with the root key that this application pins")
        try:
            root = b64u_decode(pins[0])
        except InvalidMessage as exc:
            raise SettingsError("?trust= in the connection string is not base64url: copy it whole") from exc
        if len(root) != KEY_BYTES:
            raise SettingsError(f"?trust= in the connection string must hold {KEY_BYTES} bytes: copy it whole")
        authority = f"[{host}]" if ":" in host else checked_host(host)
        return cls(f"{schemes[parts.scheme]}://{authority}{f':{port}' if port is not None else ''}", root)

    def __str__(self) -> str:
        scheme, _, authority = self.base_url.partition("://")
        return f"{'lacre' if scheme == 'https' else 'lacre+http'}://{authority}?trust={b64u(self.root)}"


@dataclass(frozen=True, slots=True)
class Step:
    """A verified root statement, and the root after it: the next one, if the statement hands over."""

    root: bytes
    statement: RootStatement


@dataclass(frozen=True, slots=True)
class Trusted:
    """A verified manifest, and what verified it.

    roots: the pinned root and every root that the chain led to. Together they are the *lineage* that versions are remembered
    for. steps: the statements on the way; the last one names the signer. document: the original bytes, so that they can be
    stored.
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
    steps = follow(chain_of(parsed, root), root)
    statement = steps[-1].statement
    if now >= statement.expires_at:
        raise Expired("the signer has expired: the operator must run `lacre signer rotate`")
    manifest = Manifest.parse(Members(verify_jws(parsed.manifest, statement.signer, MANIFEST_TYP), "the manifest"))
    if now >= manifest.expires_at:
        raise Expired("the manifest has expired: the operator must run `lacre manifest publish`, or this clock is wrong")
    if manifest.issued_at > now + MAX_FUTURE:
        raise Expired("the manifest is not valid yet: this machine's clock is behind")
    roots = dict.fromkeys((root, *(step.root for step in steps)))
    return Trusted(manifest, tuple(roots), steps, parsed.manifest, document)


def chain_of(document: Document, pinned: bytes) -> tuple[Entry, ...]:
    """The document's chain that the pinned root leads; `roots` if neither is. At most twice the work of one."""
    if document.beside:
        try:
            follow(document.roots, pinned)
        except UntrustedRoot:
            return document.beside
    return document.roots


def follow(chain: Sequence[Entry], pinned: bytes) -> tuple[Step, ...]:
    """The statements from the pinned root on, at least one. Earlier ones are the history of other roots.

    The server chooses the statements before the pinned root's first statement, so the search for it is bounded. Raises
    UntrustedRoot or InvalidMessage.
    """
    signatures = _Signatures()
    root = pinned
    steps: list[Step] = []
    for entry in chain[_first(chain, pinned, signatures) :]:
        statement = signatures.statement(entry, root)
        if statement is None:
            raise UntrustedRoot("the chain of root statements has a gap: a statement is not signed by the root before it")
        if statement.next_root is not None and statement.next_root != root:
            # Both roots sign the same bytes: the old one hands over, the new one accepts.
            payloads = {token.split(".")[1] for token in entry}
            if len(payloads) != 1 or signatures.statement(entry, statement.next_root) is None:
                raise UntrustedRoot("a change of root is not signed by the new root")
            root = statement.next_root
        steps.append(Step(root, statement))
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Which roots handed over to a root. roots: those that did, directly or through others.

    oldest: the first such change of root, if the chain does not name its signer.
    """

    roots: frozenset[bytes] = frozenset()
    oldest: Entry | None = None

    @classmethod
    def of(cls, chain: Sequence[Entry], root: bytes) -> Ancestry:
        """Goes back from `root` and verifies only the statements that name it: the rest of the chain costs nothing."""
        claims, signatures, found = _claims(chain), _Signatures(), [root]
        at: int | None = len(chain)
        for _ in range(MAX_HANDOVERS):
            named = _naming(claims[:at], found[-1])
            at = next((index for index in named if signatures.statement(chain[index], found[-1])), None)
            if at is None:
                break
            before = next((claim for claim in reversed(claims[:at]) if claim is not None), None)
            if before is None or signatures.statement(chain[at], before) is None:
                return cls(frozenset(found[1:]), chain[at])
            found.append(before)
        return cls(frozenset(found[1:]))

    def signed_by(self, root: bytes) -> bool:
        """Whether this root, by its own statement, is one of them."""
        return root in self.roots or (self.oldest is not None and _verified_by(self.oldest, root) is not None)


def _first(chain: Sequence[Entry], pinned: bytes, signatures: _Signatures) -> int:
    """The index of the pinned root's first statement. Raises UntrustedRoot.

    In an honest chain it is the first statement of all, or the one that names this root as the next. For any other chain, this
    checks the last statements, and as many of the first ones as cost little.
    """
    for index in (*_naming(_claims(chain), pinned), 0):
        if signatures.statement(chain[index], pinned) is not None:
            return index
    start = len(chain)
    while start > 0 and signatures.statement(chain[start - 1], pinned) is not None:
        start -= 1
    if start < len(chain):
        return start
    for index, entry in enumerate(chain[:MAX_FOREIGN]):
        if signatures.statement(entry, pinned) is not None:
            return index
    raise UntrustedRoot("no root statement is signed by the pinned root: it is the wrong gateway, or the pin of another one")


def _naming(claims: Sequence[bytes | None], root: bytes) -> tuple[int, ...]:
    """The first statements that name `root` as the next one. Nothing is verified: this only says where to look."""
    return tuple(itertools.islice((index for index, claim in enumerate(claims) if claim == root), MAX_CLAIMS))


def _claims(chain: Sequence[Entry]) -> list[bytes | None]:
    """The next root that each change of root names, unverified; None for other statements."""
    return [_claimed(entry) if len(entry) > 1 and len(entry[0]) <= MAX_STATEMENT else None for entry in chain]


def _claimed(entry: Entry) -> bytes | None:
    try:
        return RootStatement.parse(Members(read_object(entry[0].split(".")[1]), "a root statement")).next_root
    except (InvalidMessage, IndexError):
        return None


class _Signatures:
    """Checks root statements, each with one key only once: a chain that repeats a statement causes no further work."""

    def __init__(self) -> None:
        self._known: dict[tuple[Entry, bytes], RootStatement | None] = {}

    def statement(self, entry: Entry, root: bytes) -> RootStatement | None:
        """The statement in `entry` if one of its signatures is by `root`. Raises InvalidMessage or MessageTooLarge."""
        if (entry, root) not in self._known:
            self._known[entry, root] = _verified_by(entry, root)
        return self._known[entry, root]


def _verified_by(entry: Entry, root: bytes) -> RootStatement | None:
    for token in entry:
        if len(token) > MAX_STATEMENT:
            raise MessageTooLarge(f"a root statement has over {MAX_STATEMENT} characters")
        try:
            return RootStatement.parse(Members(verify_jws(token, root, ROOT_TYP), "a root statement"))
        except InvalidSignature:
            continue
    return None
