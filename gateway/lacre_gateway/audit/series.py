"""Logs that continue each other, in one folder: the first log in the folder itself, the others in `log-2`, `log-3`, and so on.

Rules:
- The last entry of a log that was rotated says so. The first entry of the next log holds the last checkpoint before it.
- A new log appears whole, by one rename. After a crash before that, the next start makes it again.
- The origin of the n-th log is `<origin of the first>/<n>`, because one origin has one tree.
- If the gateway's key was replaced, the last entry of the old log names the key of the next one.
- Of an erased log, its checkpoints remain, and the proof of its first entry, which links it to the log before.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import LacreError
from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key
from lacre.runtime.private_files import replace, sync_folder
from lacre_gateway.audit import journal, tiles
from lacre_gateway.audit.entries import LogLink, encode, parse
from lacre_gateway.audit.reader import CHECKPOINT, KEY, OPEN, LogReader, Wrong, own_key, read_file

ASKED: Final = "rotate"  # a file beside the first log: someone asks for a rotation
PROOF: Final = "erased"  # in an erased log: the proof of its first entry
_NAME: Final = re.compile(r"log-([1-9][0-9]{0,5})")
_UNFINISHED: Final = ".log-next"
_REMAINS: Final = ".erasing"
_PATIENCE: Final = 30.0  # seconds that `lacre audit rotate` waits for the gateway
_BEGINS: Final = 3.0  # seconds that a rotation may take between the end of a log and the next one, even on a slow disk
_TRY: Final = 0.1  # seconds between two looks for the new log
MISSING: Final = "it is missing. If a crash stopped the rotation, the gateway's next start makes it"
UNRECORDED: Final = "it was erased, and no later log has recorded that"
NOT_NAMED: Final = "it is not the key of the log before, which does not name it"
_MAX_PROOF: Final = 256 * 1024  # bytes; an entry has at most 64 KiB, in base64


def name(number: int) -> str:
    return f"log-{number}"


def place(root: Path, number: int) -> Path:
    """The folder of a log, counted from 1."""
    return root if number == 1 else root / name(number)


def newest(root: Path) -> int:
    """The number of the newest log."""
    found = (_NAME.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return max((int(match[1]) for match in found if match), default=1)


def following(origin: str, number: int) -> str:
    """The origin of the log after the one of this origin and number."""
    first = origin.removesuffix(f"/{number}") if number > 1 else origin
    return f"{first}/{number + 1}"


def ask(root: Path) -> bool:
    """Asks the gateway that writes this log for a rotation. Whether the new log was there in time. Raises OSError."""
    number, end = newest(root), time.monotonic() + _PATIENCE
    replace(root / ASKED, b"")
    while newest(root) == number and time.monotonic() < end:
        time.sleep(_TRY)
    return newest(root) > number


def erased(folder: Path) -> AuditProof | None:
    """The proof of the first entry, if the log was erased. Raises Wrong, or SettingsError if the file cannot be read."""
    data = read_file(folder / PROOF, _MAX_PROOF)
    if data is None:
        return None
    try:
        return AuditProof.parse(data.decode())
    except (LacreError, UnicodeDecodeError) as exc:
        raise Wrong(PROOF, f"it is damaged ({exc})") from exc


def remains(folder: Path, key: bytes) -> AuditProof | None:
    """The proof of an erased log's first entry, under its last checkpoint; None if the log was not erased.

    Who erased the log is not said: see `kinds.ERASED`. Raises Wrong or SettingsError.
    """
    first = erased(folder)
    if first is None:
        return None
    note = read_file(folder / CHECKPOINT, checkpoints.MAX_NOTE) or b""
    try:
        checkpoints.verify(note, key)
    except LacreError as exc:
        raise Wrong(CHECKPOINT, str(exc)) from exc
    if first.checkpoint != note or first.index:
        raise Wrong(PROOF, "it does not prove the first entry under the last checkpoint")
    try:
        first.verify(key)
    except LacreError as exc:
        raise Wrong(PROOF, str(exc)) from exc
    return first


@contextmanager
def named(number: int) -> Iterator[None]:
    """Puts the log's folder before the place of a fault."""
    try:
        yield
    except Wrong as exc:
        raise exc if number == 1 else Wrong(f"{name(number)}/{exc.place}", exc.why) from exc


def keys(root: Path, known: bytes | None) -> list[bytes]:
    """The keys of all logs, by their own files. known: of any log of these, or None.

    If no log names the known key, it is the key of all, so that none holds. Raises SettingsError.
    """
    own = [own_key(place(root, number)) for number in range(1, newest(root) + 1)]
    return own if known is None or known in own else [known] * len(own)


def key_of(root: Path, number: int, known: bytes | None) -> bytes:
    """The same for one log, where others may be missing. Raises SettingsError."""
    folders = [place(root, each) for each in range(1, newest(root) + 1)]
    if known is None or known in {own_key(folder) for folder in folders if (folder / KEY).exists()}:
        return own_key(place(root, number))
    return known


def appears(root: Path, number: int) -> bool:
    """Whether the log is there, or comes soon: a rotation that is under way has ended one log, and begins the next."""
    end = time.monotonic() + _BEGINS
    while newest(root) < number and time.monotonic() < end:
        time.sleep(_TRY)
    return newest(root) >= number


def last_time(reader: LogReader) -> float:
    """The time of the newest entry that has one, in seconds since the epoch; only an annex has none. 0 without entries."""
    for index in range(reader.size - 1, -1, -1):
        members = parse(reader.entry(index))
        if "time" in members:
            return float(members["time"])
    return 0.0


def begin(folder: Path, origin: str, key: Ed25519PrivateKey, link: LogLink, state: bytes) -> None:
    """Makes the log of this folder, with the link as its only entry. state: of the file `open`. Raises OSError."""
    entry = encode(link)[0]
    public, leaf = raw_public_key(key), merkle.leaf_hash(entry)
    note = Checkpoint(origin, 1, leaf).sign(key, checkpoints.key_id(origin, public))
    beside = folder.parent / _UNFINISHED
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(mode=0o700)
    files = [
        (KEY, (checkpoints.verifier_key(origin, public) + "\n").encode()),
        (tiles.tile(0, 0, 1), leaf),
        (tiles.tile(None, 0, 1), tiles.encode_bundle([entry])),
        (OPEN, state),
        (CHECKPOINT, note),
    ]
    tiles.write_files(beside, files)
    beside.rename(folder)
    sync_folder(folder.parent)


def erase(folder: Path, key: bytes) -> None:
    """Erases the entries and tiles of an old log; what links the logs remains. Can be repeated after a fault.

    The caller has recorded it. Raises OSError, or Wrong if the log does not hold: then nothing was erased.
    """
    if not (folder / PROOF).exists():
        reader = LogReader(folder, key)
        first = reader.proof(0)
        first.verify(key)
        replace(folder / PROOF, first.text().encode())
    remains = folder / _REMAINS
    if remains.exists():
        shutil.rmtree(remains)
    if (folder / "tile").exists():
        (folder / "tile").rename(remains)
        sync_folder(folder)
        shutil.rmtree(remains)
    for file in (journal.NAME, journal.OLD, OPEN):
        (folder / file).unlink(missing_ok=True)


def unfinished(folder: Path) -> bool:
    """Whether the erasure of this log began and did not end."""
    return (folder / PROOF).exists() and ((folder / "tile").exists() or (folder / _REMAINS).exists())
