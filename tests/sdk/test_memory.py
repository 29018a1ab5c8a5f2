"""What is remembered of manifests, in the process and on disk: versions only rise, and no root statement is taken back."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import errors
from lacre.jose.jws import raw_public_key
from lacre.trust.chain import MAX_HANDOVERS
from lacre.trust.manifest_store import MAX_REMEMBERED, Memory, VersionFile, VersionMemory, accept
from parts.trust import DAY, NOW, PINNED, ROOTS, changes, document, foreign, manifest, signature_checks, statement

FIRST, SECOND, THIRD, LAST = map(raw_public_key, ROOTS)
THIEF, STOLEN, SUCCESSOR = (Ed25519PrivateKey.generate() for _ in range(3))
OWN, CHANGES = statement(ROOTS[0]), changes()  # R0 hands over to R1, R2 and R3
WHOLE = [OWN, *CHANGES]
HANDOVER = statement(ROOTS[0], ROOTS[1], signer=THIEF)
BEFORE, AFTER = statement(ROOTS[0], signer=STOLEN), statement(ROOTS[0], signer=SUCCESSOR)
NONE = 0  # the version that is believed then: none, it is a rollback


def of(version: int, *chain: Any, signer: Any = None, **times: float) -> bytes:
    return document(*chain, of=manifest(version, **times), **({} if signer is None else {"signer": signer}))


# What is served one after the other, with the pin it is held against, and the version that is believed then; at last, when.
HISTORIES: dict[str, list[tuple[Any, ...]]] = {
    "a lower version, while the newer is valid": [(of(5), FIRST, 5), (of(4), FIRST, 5), (of(6), FIRST, 6)],
    "a lower version, once the newer has expired": [(of(5, expires=NOW + 10), FIRST, 5), (of(4), FIRST, NONE, NOW + 20)],
    "the same version with other bytes": [(of(5), FIRST, 5), (of(5, issued=NOW - 1), FIRST, NONE)],
    "the same, after its expiry": [(of(5, expires=NOW + 10), FIRST, 5), (of(5), FIRST, NONE, NOW + 20)],
    "another root has a memory of its own": [(of(5), FIRST, 5), (of(1, statement(ROOTS[1])), SECOND, 1)],
    "a pin moves to a root already met": [(of(5, *CHANGES), FIRST, 5), (of(4, *CHANGES), THIRD, 5)],
    # and what was seen does not reach to the new pin
    "a pin moves to a root never met": [(of(5), FIRST, 5), (of(4, *WHOLE), THIRD, NONE), (of(6, *WHOLE), THIRD, 6)],
    "old and new pins on one machine": [(of(5, *WHOLE), FIRST, 5), (of(7, *WHOLE), THIRD, 7), (of(6, *WHOLE), FIRST, 7)],
    # the second is of a trimmed chain: unrelated yet
    "lineages that turn out to be one": [
        (of(3, OWN), FIRST, 3), (of(9, WHOLE[-1]), LAST, 9), (of(8, *WHOLE), FIRST, NONE), (of(10, *WHOLE), FIRST, 10),
    ],
    "the thief of a replaced signer": [
        (of(5, BEFORE, AFTER, signer=SUCCESSOR), FIRST, 5), (of(99, BEFORE, signer=STOLEN), FIRST, 5),
        (of(99, BEFORE, signer=STOLEN, issued=NOW + DAY, expires=NOW + 2 * DAY), FIRST, NONE, NOW + DAY),
    ],
    # The last chain's last statement says what the last one seen said, but by the wrong root.
    "the thief of a replaced root": [
        (of(5, HANDOVER, statement(ROOTS[1])), FIRST, 5),
        *((of(99, *chain, signer=THIEF), FIRST, 5)
          for chain in ([statement(ROOTS[0], signer=THIEF)], [HANDOVER], [OWN, HANDOVER])),
    ],
    "a chain served short forgets no root": [
        (of(5, *CHANGES), FIRST, 5), (of(7, CHANGES[-1]), LAST, 7), (of(6, OWN), FIRST, NONE),
    ],
    "a longer chain under the same manifest": [(of(5, OWN), FIRST, 5), (of(5, *WHOLE), FIRST, 5), (of(4, *CHANGES), THIRD, 5)],
}  # fmt: skip


@pytest.fixture(params=["process", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return VersionMemory() if request.param == "process" else VersionFile(tmp_path / "manifests")


def believed(served: bytes, memory: Memory, pin: bytes = PINNED, now: float = NOW) -> int:
    try:
        return accept(served, pin, memory, now).manifest.version
    except errors.Rollback:
        return NONE


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_versions_only_rise(memory: Memory, history: list[tuple[Any, ...]]) -> None:
    for number, (served, pin, version, *when) in enumerate(history):
        assert believed(served, memory, pin, *when) == version, f"step {number}"


class TestForeignStatements:
    """What is served beside the pinned root's own chain costs nothing for each lineage that is remembered."""

    LINEAGES = 30

    @pytest.fixture
    def crowded(self) -> VersionMemory:
        memory = VersionMemory()
        for _ in range(self.LINEAGES):
            other = Ed25519PrivateKey.generate()
            accept(document(statement(other)), raw_public_key(other), memory, NOW)
        return memory

    def test_no_check_for_other_lineages(self, crowded: VersionMemory) -> None:
        served = document(*foreign(999), OWN)
        assert signature_checks(lambda: accept(served, PINNED, crowded, NOW)) < 12

    def test_few_where_the_root_took_over(self, crowded: VersionMemory) -> None:
        """One for each remembered root, of who handed over first: that, no chain names."""
        served = document(*foreign(900), *CHANGES)
        assert signature_checks(lambda: accept(served, THIRD, crowded, NOW)) < 30 + 4 * self.LINEAGES

    def test_an_endless_history_is_followed_so_far(self, crowded: VersionMemory) -> None:
        """Each change is really signed: whoever serves it holds all the keys but the pinned root's."""
        others = [Ed25519PrivateKey.generate() for _ in range(400)]
        served = document(*changes([*others, ROOTS[1]]))
        assert signature_checks(lambda: accept(served, SECOND, crowded, NOW)) < 12 * MAX_HANDOVERS + 4 * self.LINEAGES

    def test_what_was_seen_is_found_behind_them(self) -> None:
        memory = VersionMemory()
        assert believed(of(5), memory) == 5
        assert believed(of(4, *foreign(50), *CHANGES), memory, THIRD) == NONE


class TestWaiting:
    """Nobody waits without end for another one that holds the memory, and nobody goes on without it."""

    def test_a_file_that_stays_locked(self, tmp_path: Path) -> None:
        holder = os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(errors.SettingsError, match="locked the stored manifests"):
                accept(of(1), PINNED, VersionFile(tmp_path, patience=0.1), NOW)
        finally:
            os.close(holder)
        assert believed(of(1), VersionFile(tmp_path, patience=0.1)) == 1

    def test_a_thread_that_does_not_come_to_an_end(self) -> None:
        memory, entered, leave = VersionMemory(patience=0.1), threading.Event(), threading.Event()

        def stuck(_: object) -> Any:
            entered.set()
            leave.wait(60)
            raise errors.UsageError("enough")

        def hold() -> None:
            with pytest.raises(errors.UsageError):
                memory.update(stuck)

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait(60)
        with pytest.raises(errors.SettingsError, match="locked the stored manifests"):
            accept(of(1), PINNED, memory, NOW)
        leave.set()
        thread.join(60)
        assert believed(of(1), memory) == 1


class TestVersionFile:
    def test_private_and_remembered_by_another_process(self, tmp_path: Path) -> None:
        folder = tmp_path / "manifests"
        accept(of(5), PINNED, VersionFile(folder), NOW)
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
        assert believed(of(4), VersionFile(folder)) == 5

    def test_nothing_new_writes_nothing(self, tmp_path: Path) -> None:
        for _ in range(2):  # two pins of one lineage, and another lineage
            accept(of(5, *CHANGES), FIRST, VersionFile(tmp_path), NOW)
            accept(of(5, *CHANGES), THIRD, VersionFile(tmp_path), NOW)
            accept(of(1, statement(THIEF)), raw_public_key(THIEF), VersionFile(tmp_path), NOW)
            written = (tmp_path / "seen.json").stat().st_ino
        accept(of(5, *CHANGES), THIRD, VersionFile(tmp_path), NOW)
        assert (tmp_path / "seen.json").stat().st_ino == written

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            *((text, "damaged") for text in ("{", "{}", "[{}]", "null")),
            ('[{"pin": "AA", "roots": [], "ver": "x", "document": ""}]', "damaged"),
            (" " * (MAX_REMEMBERED + 1), "bytes"),
        ],
        ids=["cut", "an object", "nothing of an entry", "null", "another form", "without end"],
    )
    def test_a_damaged_file_is_no_way_back(self, tmp_path: Path, content: str, told: str) -> None:
        accept(of(5), PINNED, VersionFile(tmp_path), NOW)
        (tmp_path / "seen.json").write_text(content)
        with pytest.raises(errors.SettingsError, match=told):
            accept(of(4), PINNED, VersionFile(tmp_path), NOW)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(errors.SettingsError, match="VersionMemory"):
            accept(of(1), PINNED, VersionFile(tmp_path / "file" / "x"), NOW)

    def test_between_processes_the_newest_wins(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from lacre.trust.manifest_store import VersionFile, accept;"
            "folder, root, now, *files = sys.argv[1:];"
            "[accept(Path(f).read_bytes(), bytes.fromhex(root), VersionFile(Path(folder)), float(now)) for f in files]"
        )
        files = [tmp_path / f"{version}.document" for version in range(1, 13)]
        for version, file in enumerate(files, 1):
            file.write_bytes(of(version))
        commands = [[sys.executable, "-P", "-c", code, tmp_path, PINNED.hex(), str(NOW), *files[at::3]] for at in range(3)]
        running = [subprocess.Popen(command) for command in commands]
        assert [process.wait(60) for process in running] == [0, 0, 0]
        assert believed(files[0].read_bytes(), VersionFile(tmp_path)) == 12
