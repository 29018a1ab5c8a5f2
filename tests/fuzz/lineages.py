"""A target of everything that a client believes about roots: chains of statements by many keys, served in any order and form.

An input is a script: some documents, each a chain of statements, each signed by roots that the script picks. A client that
remembers takes them one after the other, by a pin of the script's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fuzz.statements import MANIFEST, NOW, OF_TRUST, SIGNER
from fuzz.target import Script, Target
from lacre.errors import Rollback
from lacre.jose.jws import raw_public_key, sign_bytes
from lacre.trust.manifest import ROOT_TYP, Document, Manifest, RootStatement
from lacre.trust.manifest_store import VersionMemory, accept
from lacre.trust.rollback import Seen
from lacre.trust.signing import sign_manifest

ROOTS: Final = tuple(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in range(11, 17))
DOCUMENTS: Final = 5
STATEMENTS: Final = 8


def lineage(data: bytes) -> VersionMemory:
    """Refusals of a document are no end of it: the next may be taken."""
    script, memory = Script(data), VersionMemory()
    for _ in range(script.number() % (DOCUMENTS + 1)):
        pin = raw_public_key(ROOTS[script.number() % len(ROOTS)])
        try:
            taken = accept(_document(script), pin, memory, NOW)
        except (*OF_TRUST, Rollback):
            continue
        assert taken.roots[0] == pin
        # Nothing newer of the same roots is remembered than what was taken.
        mine = [seen for seen in remembered(memory) if set(seen.roots) & set(taken.roots)]
        assert [seen.version for seen in mine] == [taken.manifest.version]
    return memory


def remembered(memory: VersionMemory) -> tuple[Seen, ...]:
    return memory.update(lambda seen: (tuple(seen), tuple(seen)))  # type: ignore[arg-type, return-value]


def _document(script: Script) -> bytes:
    chain = tuple(_statements(script)) or (("x.y.z",),)
    version = script.number() % 4
    manifest = Manifest("fuzz", version, NOW, NOW + 100 * version, MANIFEST.gateway_key, {})
    return Document(chain, sign_manifest(manifest, SIGNER)).encode()


def _statements(script: Script) -> Iterator[tuple[str, ...]]:
    entry: tuple[str, ...] = ("x.y.z",)
    for _ in range(script.number() % (STATEMENTS + 1)):
        kind, by, to = script.number() % 8, script.number() % len(ROOTS), script.number() % len(ROOTS)
        if kind == 0:
            yield entry  # the last one again
            continue
        if kind == 1:
            yield (script.text().decode("latin-1"),) * (1 + by % 2)
            continue
        changes = kind in (2, 3, 4)
        statement = RootStatement(
            raw_public_key(SIGNER), NOW + 1000 * (kind + 1), raw_public_key(ROOTS[to]) if changes else None
        )
        signers = (ROOTS[by], ROOTS[to])[: 1 if kind == 4 or not changes else 2]
        entry = tuple(sign_bytes(statement.payload(), key, ROOT_TYP) for key in signers)
        yield entry


def lineages_share_no_root(_data: bytes, memory: VersionMemory) -> None:
    roots = [root for seen in remembered(memory) for root in seen.roots]
    assert len(roots) == len(set(roots))


TARGETS: Final = (Target("lineage", lineage, (), lineages_share_no_root, max_length=512),)
