"""The root and signer keys of a state folder, and the chain of signed statements from one key to the next.

    root.pem signer.pem              the current keys
    root.next.pem signer.next.pem    the next keys, while a change is in progress
    trust/chain.json                 every statement that a root made here, and the keys that they lead to
    trust/before.json                the chain of a lost root that was replaced

Rules:
- The chain only grows: some application pins the first root, and another remembers the last statement.
- chain.json is replaced atomically and says which keys are current. A change writes the new key, then the chain, and destroys
  the old key last. So after a crash at any point the keys that the chain names exist, and the next run cleans up.
- Public keys are read from the chain. The root's private key only signs statements, and may be stored elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.jws import b64u, b64u_decode, raw_public_key
from lacre.trust.manifest import MAX_CHAIN, Document, RootStatement
from lacre.trust.signing import sign_statement
from lacre_fabric.keys.secret_files import destroy, destroy_leftovers, ed25519, read_ed25519, write_ed25519, write_secret

DAY: Final = 86400.0
SIGNER_LIFETIME: Final = 90 * DAY
SIGNER_RENEWAL: Final = 30 * DAY  # this long before the signer expires, the root renews its statement
MAX_CHANGES: Final = MAX_CHAIN - 100  # statements; the rest are for renewals: enough for 16 years


@dataclass(frozen=True, slots=True)
class Chain:
    """The content of chain.json. roots: every root that was current here, the newest last. entries: the signed statements.
    until: the signer's expiry.
    """

    roots: tuple[bytes, ...]
    signer: bytes
    until: float
    entries: tuple[tuple[str, ...], ...] = ()

    def encode(self) -> bytes:
        roots, signer = [b64u(root) for root in self.roots], b64u(self.signer)
        return json.dumps({"roots": roots, "signer": signer, "until": self.until, "chain": self.entries}, indent=1).encode()

    @classmethod
    def parse(cls, members: Any) -> Chain:
        roots = tuple(map(b64u_decode, members["roots"]))
        entries = tuple(tuple(map(str, entry)) for entry in members["chain"])
        return cls(roots, b64u_decode(members["signer"]), float(members["until"]), entries)


def _read(path: Path) -> Chain:
    try:
        return Chain.parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, InvalidMessage) as exc:
        raise SettingsError(f"{path} is missing or damaged: restore it, or use a new state folder") from exc


class Authority:
    """The keys of a state folder. Changes require the folder's lock. Raises SettingsError if a file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "trust" / "chain.json"

    def create(self, now: float) -> None:
        """Makes the first root and signer, and the statement between them. Keeps existing ones."""
        if self._path.exists():
            return
        root, signer = ed25519(self._folder / "root.pem"), ed25519(self._folder / "signer.pem")
        chain = Chain((raw_public_key(root),), raw_public_key(signer), now + SIGNER_LIFETIME)
        self._extend(chain, sign_statement(RootStatement(chain.signer, chain.until), root))

    def chain(self) -> Chain:
        return _read(self._path)

    def renewed(self, now: float) -> Chain:
        """The chain. If the signer's statement will expire soon and the root is here, a new statement is added."""
        chain = self.chain()
        if now < chain.until - SIGNER_RENEWAL or not (self._folder / "root.pem").exists():
            return chain
        again = Chain(chain.roots, chain.signer, now + SIGNER_LIFETIME, chain.entries)
        return self._extend(again, sign_statement(RootStatement(again.signer, again.until), self._root(chain)))

    def signer(self) -> Ed25519PrivateKey:
        return self._find("signer", self.chain().signer)

    def rotate_signer(self, now: float) -> Chain:
        """Makes a new signer. The old key stays on disk until `settle`."""
        chain, signer = self._begin(), Ed25519PrivateKey.generate()
        root = self._root(chain)
        write_ed25519(self._folder / "signer.next.pem", signer)
        after = Chain(chain.roots, raw_public_key(signer), now + SIGNER_LIFETIME, chain.entries)
        return self._extend(after, sign_statement(RootStatement(after.signer, after.until), root))

    def rotate_root(self, now: float) -> Chain:
        """Makes a new root for the same signer: the old root hands over, the new one accepts. The old key stays until
        `settle`.
        """
        chain, following = self._begin(), Ed25519PrivateKey.generate()
        root = self._root(chain)
        write_ed25519(self._folder / "root.next.pem", following)
        after = Chain((*chain.roots, raw_public_key(following)), chain.signer, now + SIGNER_LIFETIME, chain.entries)
        statement = RootStatement(after.signer, after.until, after.roots[-1])
        return self._extend(after, sign_statement(statement, root, following))

    def replace_root(self, now: float) -> Chain:
        """Makes a new root in place of a lost one, for the same signer. No one can sign the way from the old root to it.

        Both chains are served while they name the same signer: the old pins hold until its statement expires. Raises
        SettingsError if the root is here.
        """
        chain = self._begin()
        try:
            self._root(chain)
        except SettingsError:
            pass
        else:
            raise SettingsError(f"{self._folder} holds the private key of the current root: use `lacre root rotate`")
        following = Ed25519PrivateKey.generate()
        write_secret(self._path.with_name("before.json"), chain.encode())
        write_ed25519(self._folder / "root.next.pem", following)
        after = Chain((raw_public_key(following),), chain.signer, now + SIGNER_LIFETIME)
        return self._extend(after, sign_statement(RootStatement(after.signer, after.until), following))

    def before(self) -> Chain | None:
        """The chain of a root that was replaced; None if there was none."""
        path = self._path.with_name("before.json")
        if not path.exists():
            return None
        before, chain = _read(path), self.chain()
        return before if before.roots[-1] != chain.roots[-1] else None

    def document(self, manifest: str, chain: Chain, now: float) -> Document:
        """With the chain of a replaced root first, as long as it is valid: older clients know no other member."""
        before = self.before()
        if before is None or before.signer != chain.signer or now >= before.until:
            return Document(chain.entries, manifest)
        return Document(before.entries, manifest, chain.entries)

    def adopt(self, chain: Chain) -> None:
        """Replaces the chain by a verified newer one. Private keys that it names may be missing here."""
        write_secret(self._path, chain.encode())

    def settle(self) -> None:
        """Destroys the keys that the chain does not name, and puts the next key in the current one's place."""
        chain = self.chain()
        for name, public_key in (("root", chain.roots[-1]), ("signer", chain.signer)):
            current, coming = self._folder / f"{name}.pem", self._folder / f"{name}.next.pem"
            if coming.exists():
                if raw_public_key(read_ed25519(coming)) == public_key:
                    destroy(current)
                    coming.rename(current)
                else:
                    destroy(coming)
            destroy_leftovers(self._folder, name)

    def _begin(self) -> Chain:
        self.settle()
        chain = self.chain()
        if len(chain.entries) >= MAX_CHANGES:
            raise SettingsError(
                f"the chain of root statements has {len(chain.entries)} entries, and clients accept {MAX_CHAIN}:  "
                "start with a new state folder, and give applications its root to pin"
            )
        return chain

    def _extend(self, chain: Chain, entry: tuple[str, ...]) -> Chain:
        longer = Chain(chain.roots, chain.signer, chain.until, (*chain.entries, entry))
        write_secret(self._path, longer.encode())
        return longer

    def _root(self, chain: Chain) -> Ed25519PrivateKey:
        return self._find("root", chain.roots[-1])

    def _find(self, name: str, public_key: bytes) -> Ed25519PrivateKey:
        for path in (self._folder / f"{name}.next.pem", self._folder / f"{name}.pem"):
            if path.exists():
                key = read_ed25519(path)
                if raw_public_key(key) == public_key:
                    return key
        raise SettingsError(f"{self._folder} does not hold the private key of the current {name}: put {name}.pem back first")
