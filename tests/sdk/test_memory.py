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
from parts.trust import NOW, PINNED, ROOTS, changes, document, foreign, manifest, signature_checks, statement

FIRST, SECOND, THIRD, _ = map(raw_public_key, ROOTS)
THIEF = Ed25519PrivateKey.generate()


@pytest.fixture(params=["process", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return VersionMemory() if request.param == "process" else VersionFile(tmp_path / "manifests")


class TestMemory:
    def test_a_lower_version_is_passed_over_while_the_newer_is_valid(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        assert accept(document(of=manifest(4)), PINNED, memory, NOW).manifest.version == 5
        assert accept(document(of=manifest(6)), PINNED, memory, NOW).manifest.version == 6

    def test_a_lower_version_is_refused_once_the_newer_has_expired(self, memory: Memory) -> None:
        accept(document(of=manifest(5, expires=NOW + 10)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(4)), PINNED, memory, NOW + 20)

    def test_the_same_version_with_other_bytes_is_refused(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(5, issued=NOW - 1)), PINNED, memory, NOW)

    def test_the_same_version_with_other_bytes_is_refused_after_its_expiry_too(self, memory: Memory) -> None:
        accept(document(of=manifest(5, expires=NOW + 10)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(5)), PINNED, memory, NOW + 20)

    def test_other_roots_have_memories_of_their_own(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        other = document(statement(ROOTS[1]), of=manifest(1))
        assert accept(other, raw_public_key(ROOTS[1]), memory, NOW).manifest.version == 1


class TestLineage:
    """R0 hands over to R1, R2 and R3; what was seen under one is known under the others."""

    def test_a_pin_that_moves_to_a_root_already_met_keeps_its_memory(self, memory: Memory) -> None:
        accept(document(*changes(), of=manifest(5)), FIRST, memory, NOW)
        assert accept(document(*changes(), of=manifest(4)), THIRD, memory, NOW).manifest.version == 5

    def test_a_pin_that_moves_to_a_root_never_met_keeps_it_too(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), FIRST, memory, NOW)
        chain = [statement(ROOTS[0]), *changes()]
        with pytest.raises(errors.Rollback):  # and what was seen does not reach to the new pin
            accept(document(*chain, of=manifest(4)), THIRD, memory, NOW)
        assert accept(document(*chain, of=manifest(6)), THIRD, memory, NOW).manifest.version == 6

    def test_old_and_new_pins_on_one_machine_share_it(self, memory: Memory) -> None:
        chain = [statement(ROOTS[0]), *changes()]
        accept(document(*chain, of=manifest(5)), FIRST, memory, NOW)
        accept(document(*chain, of=manifest(7)), THIRD, memory, NOW)
        assert accept(document(*chain, of=manifest(6)), FIRST, memory, NOW).manifest.version == 7

    def test_lineages_that_turn_out_to_be_one(self, memory: Memory) -> None:
        chain = [statement(ROOTS[0]), *changes()]
        accept(document(*chain[:1], of=manifest(3)), FIRST, memory, NOW)
        accept(document(*chain[-1:], of=manifest(9)), raw_public_key(ROOTS[3]), memory, NOW)  # a trimmed chain: unrelated yet
        with pytest.raises(errors.Rollback):
            accept(document(*chain, of=manifest(8)), FIRST, memory, NOW)
        assert accept(document(*chain, of=manifest(10)), FIRST, memory, NOW).manifest.version == 10

    def test_the_thief_of_a_replaced_signer_cannot_go_on(self, memory: Memory) -> None:
        stolen, successor = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        before, after = statement(ROOTS[0], signer=stolen), statement(ROOTS[0], signer=successor)
        accept(document(before, after, of=manifest(5), signer=successor), PINNED, memory, NOW)
        assert accept(document(before, of=manifest(99), signer=stolen), PINNED, memory, NOW).manifest.version == 5
        with pytest.raises(errors.Rollback):
            late = manifest(99, issued=NOW + 86400, expires=NOW + 2 * 86400)
            accept(document(before, of=late, signer=stolen), PINNED, memory, NOW + 86400)

    def test_the_thief_of_a_replaced_root_cannot_go_on(self, memory: Memory) -> None:
        handover = statement(ROOTS[0], ROOTS[1], signer=THIEF)
        accept(document(handover, statement(ROOTS[1]), of=manifest(5)), PINNED, memory, NOW)
        # The last one says what the last one seen said, but by the wrong root.
        for chain in ([statement(ROOTS[0], signer=THIEF)], [handover], [statement(ROOTS[0]), handover]):
            assert accept(document(*chain, of=manifest(99), signer=THIEF), PINNED, memory, NOW).manifest.version == 5

    def test_a_chain_served_short_forgets_no_root(self, memory: Memory) -> None:
        accept(document(*changes(), of=manifest(5)), FIRST, memory, NOW)
        accept(document(*changes()[-1:], of=manifest(7)), raw_public_key(ROOTS[3]), memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(statement(ROOTS[0]), of=manifest(6)), FIRST, memory, NOW)

    def test_a_longer_chain_under_the_same_manifest(self, memory: Memory) -> None:
        first = statement(ROOTS[0])
        accept(document(first, of=manifest(5)), PINNED, memory, NOW)
        accept(document(first, *changes(), of=manifest(5)), PINNED, memory, NOW)
        assert accept(document(*changes(), of=manifest(4)), THIRD, memory, NOW).manifest.version == 5


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
        served = document(*foreign(999), statement(ROOTS[0]))
        assert signature_checks(lambda: accept(served, PINNED, crowded, NOW)) < 12

    def test_few_where_the_root_took_over(self, crowded: VersionMemory) -> None:
        """One for each remembered root, of who handed over first: that, no chain names."""
        served = document(*foreign(900), *changes())
        assert signature_checks(lambda: accept(served, THIRD, crowded, NOW)) < 30 + 4 * self.LINEAGES

    def test_an_endless_history_is_followed_so_far(self, crowded: VersionMemory) -> None:
        """Each change is really signed: whoever serves it holds all the keys but the pinned root's."""
        others = [Ed25519PrivateKey.generate() for _ in range(400)]
        served = document(*changes([*others, ROOTS[1]]))
        assert signature_checks(lambda: accept(served, SECOND, crowded, NOW)) < 12 * MAX_HANDOVERS + 4 * self.LINEAGES

    def test_what_was_seen_is_found_behind_them(self) -> None:
        memory = VersionMemory()
        accept(document(of=manifest(5)), FIRST, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(*foreign(50), *changes(), of=manifest(4)), THIRD, memory, NOW)


class TestWaiting:
    """Nobody waits without end for another one that holds the memory, and nobody goes on without it."""

    def test_a_file_that_stays_locked(self, tmp_path: Path) -> None:
        holder = os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(errors.SettingsError, match="locked the stored manifests"):
                accept(document(), PINNED, VersionFile(tmp_path, patience=0.1), NOW)
        finally:
            os.close(holder)
        assert accept(document(), PINNED, VersionFile(tmp_path, patience=0.1), NOW).manifest.version == 1

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
            accept(document(), PINNED, memory, NOW)
        leave.set()
        thread.join(60)
        assert accept(document(), PINNED, memory, NOW).manifest.version == 1

    def test_a_file_without_end_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "seen.json").open("wb") as file:
            file.truncate(MAX_REMEMBERED + 1)
        with pytest.raises(errors.SettingsError, match="bytes"):
            accept(document(), PINNED, VersionFile(tmp_path), NOW)


class TestVersionFile:
    def test_private_and_remembered_by_another_process(self, tmp_path: Path) -> None:
        folder = tmp_path / "manifests"
        accept(document(of=manifest(5)), PINNED, VersionFile(folder), NOW)
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
        assert accept(document(of=manifest(4)), PINNED, VersionFile(folder), NOW).manifest.version == 5

    def test_nothing_new_writes_nothing(self, tmp_path: Path) -> None:
        for _ in range(2):  # two pins of one lineage, and another lineage
            accept(document(*changes(), of=manifest(5)), FIRST, VersionFile(tmp_path), NOW)
            accept(document(*changes(), of=manifest(5)), THIRD, VersionFile(tmp_path), NOW)
            accept(document(statement(THIEF), of=manifest(1)), raw_public_key(THIEF), VersionFile(tmp_path), NOW)
            written = (tmp_path / "seen.json").stat().st_ino
        accept(document(*changes(), of=manifest(5)), THIRD, VersionFile(tmp_path), NOW)
        assert (tmp_path / "seen.json").stat().st_ino == written

    @pytest.mark.parametrize("content", ["{", "{}", "[{}]", "null", '[{"pin": "AA", "roots": [], "ver": "x", "document": ""}]'])
    def test_a_damaged_file_is_no_way_back(self, tmp_path: Path, content: str) -> None:
        accept(document(of=manifest(5)), PINNED, VersionFile(tmp_path), NOW)
        next(tmp_path.glob("*.json")).write_text(content)
        with pytest.raises(errors.SettingsError, match="damaged"):
            accept(document(of=manifest(4)), PINNED, VersionFile(tmp_path), NOW)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(errors.SettingsError, match="VersionMemory"):
            accept(document(), PINNED, VersionFile(tmp_path / "file" / "x"), NOW)

    def test_between_processes_the_newest_wins(self, tmp_path: Path) -> None:
        documents = [document(of=manifest(version)) for version in range(1, 13)]
        code = (
            "import sys; from pathlib import Path; from lacre.trust.manifest_store import VersionFile, accept;"
            "folder, root, now, *files = sys.argv[1:];"
            "[accept(Path(f).read_bytes(), bytes.fromhex(root), VersionFile(Path(folder)), float(now)) for f in files]"
        )
        files = []
        for number, data in enumerate(documents):
            files.append(tmp_path / f"{number}.document")
            files[-1].write_bytes(data)
        commands = [[sys.executable, "-c", code, tmp_path, PINNED.hex(), str(NOW), *files[start::3]] for start in range(3)]
        running = [subprocess.Popen(command) for command in commands]
        assert [process.wait(60) for process in running] == [0, 0, 0]
        assert accept(documents[0], PINNED, VersionFile(tmp_path), NOW).manifest.version == 12
