"""Someone who can write to the disk of a gateway, and holds none of its keys: what such a person makes of its audit logs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose.jws import b64u, raw_public_key
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import series, tiles
from lacre_gateway.audit.entries import Event, LogLink, encode
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC

THIEF: Final = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
THIEF_PUBLIC: Final = raw_public_key(THIEF)
DAY: Final = 86400.0
NOW: Final = 1_790_000_000.0  # seconds since the epoch: when the logs of `linked` end


def event(name: str, moment: float = NOW, **members: Any) -> bytes:
    (data,) = encode(Event(time=moment, event=name, **members))
    return data


def publish(store: Store, *entries: bytes) -> None:
    store.commit(list(entries))
    store.published(store.publication(()).write())


def linked(root: Path, *before: bytes, fill: int = 0, logs: int = 2) -> Path:
    """So many logs of one gateway. before: the first entries of the first log, published by themselves.

    fill: how many entries it has with its last one. After each of these bundles, the log has been written out.
    """
    store = Store(root, KEY, ORIGIN)
    publish(store, event(kinds.STARTED, NOW - 90 * DAY, count=0), *before)
    shutil.copytree(root, root.with_name("early"), ignore=shutil.ignore_patterns("lock"))
    while store.size < fill - 1:
        publish(store, *[event(kinds.RELOADED)] * min(255, fill - 1 - store.size))
    for _ in range(logs - 1):
        store.rotate(NOW, ())
        publish(store, event(kinds.RELOADED))
    store.close()
    return root


def forged(folder: Path, origin: str, *entries: bytes, key: Ed25519PrivateKey = THIEF) -> None:
    """Puts a log of the thief in the place of another. The logs after it, which may be inside this folder, stay."""
    for name in ("tile", "checkpoint", "checkpoints", "journal", "open", "key", "erased"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    made = folder / ".made"
    store = Store(made, key, origin)
    publish(store, *entries)
    store.close()
    for path in made.iterdir():
        if path.name != "lock":
            path.rename(folder / path.name)
    shutil.rmtree(made)


def bent_bundle(folder: Path, bundle: int, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """A full bundle, and not the hashes over it."""
    path = folder / tiles.tile(None, bundle)
    path.write_bytes(tiles.encode_bundle(change(tiles.decode_bundle(path.read_bytes()))))


def another_old_log(root: Path) -> None:
    forged(
        root, ORIGIN, event(kinds.STARTED, 1.0, count=0), event(kinds.ROTATED, 2.0, target=f"{ORIGIN}/2", reason=b64u(PUBLIC))
    )


def an_earlier_state(root: Path) -> None:
    """Signed by the gateway itself, before the log had its newer entries."""
    for name in ("tile", "checkpoint", "checkpoints"):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(root.with_name("early"), root, dirs_exist_ok=True)


def an_earlier_last_entry(root: Path) -> None:
    bent_bundle(root, 0, lambda entries: [*entries[:-1], event(kinds.ROTATED, 2.0, target=f"{ORIGIN}/2")])


def copied_log(root: Path) -> None:
    """An earlier state of the first log, where the second one belongs."""
    shutil.copytree(root.with_name("early"), root / "log-2")


def marked_as_erased(root: Path) -> None:
    (root / series.PROOF).write_text(LogReader(root, PUBLIC).proof(0).text())


def continued_by_a_thief(root: Path) -> None:
    """In the place of what follows an erased log: a log with a key of the thief's own, which records the erasure."""
    note = (root / "checkpoint").read_text()
    shutil.rmtree(root / "log-2")
    series.begin(root / "log-2", f"{ORIGIN}/2", THIEF, LogLink(time=2.0, checkpoint=note, open=0), b"{}")
    store = Store(root, THIEF, ORIGIN)
    publish(store, event(kinds.ERASED, target=ORIGIN, count=int(note.splitlines()[1])))
    store.close()
