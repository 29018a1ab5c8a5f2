"""What an export reads: nothing is left out in silence, and its reader may be slow, late or gone."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from lacre.errors import LacreError, SettingsError
from lacre.evidence import merkle
from lacre_fabric.logs import make_log
from lacre_gateway.audit import chain, reserve, series, tiles
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import Event, encode
from lacre_gateway.audit.feed import Cursor, read
from lacre_gateway.audit.keeping import Keeper, LogTerms
from lacre_gateway.audit.log import AuditLog, AuditUnavailable
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome, rotated
from parts.small_disk import NO_DISK, filled, small_disk
from parts.waiting import until, wait_until


async def three_logs(folder: Path) -> None:
    log = opened(folder)
    for number in range(300):
        log.append(intent(number))
        log.append(outcome(number))
    for number in (1000, 1001):
        await log.append(intent(number))
        await rotated(log)
        await log.append(outcome(number))
    await log.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feed") / "audit"
    asyncio.run(three_logs(folder))
    return folder


@pytest.fixture
def logs(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "audit"))


def all_read(root: Path, start: Cursor | None = None) -> list[tuple[str, int]]:
    return [(entry.origin, entry.index) for entry in read(root, PUBLIC, start) if entry is not None]


def everything(root: Path) -> list[tuple[str, int]]:
    return [(reader.checkpoint.origin, index) for reader in chain.readers(root, PUBLIC) for index in range(reader.size)]


# faults of the logs


def bent_with_its_tile(root: Path) -> None:
    """A forger's work: the entry and all hashes over it agree, up to the signed root."""
    bundle = root / tiles.tile(None, 1)
    entries = [entry.replace(b"alice", b"mallo") for entry in tiles.decode_bundle(bundle.read_bytes())]
    bundle.write_bytes(tiles.encode_bundle(entries))
    (root / tiles.tile(0, 1)).write_bytes(b"".join(map(merkle.leaf_hash, entries)))


def cut_bundle(root: Path) -> None:
    bundle = root / tiles.tile(None, 0)
    bundle.write_bytes(tiles.encode_bundle(tiles.decode_bundle(bundle.read_bytes())[:-1]))


def marked_as_erased(root: Path) -> None:
    """Anyone who can write there can make the file, and needs no key."""
    (root / "log-2" / series.PROOF).write_text(LogReader(root / "log-2", PUBLIC).proof(0).text())


def erased_in_secret(root: Path) -> None:
    series.erase(root, PUBLIC)


def another_second(root: Path) -> None:
    """By the holder of the key: a true log, but not the one that the first one's end leads to."""
    shutil.rmtree(root / "log-2")
    store = Store(root / "log-2", KEY, f"{ORIGIN}/2")
    store.commit(encode(Event(time=1.0, event="started")))
    store.published(store.publication(()).write())
    store.close()


def without_second(root: Path) -> None:
    shutil.rmtree(root / "log-2")


def without_third(root: Path) -> None:
    shutil.rmtree(root / "log-3")


def without_checkpoint(root: Path) -> None:
    erased(root, 1)
    (root / "checkpoint").unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an entry and its hash changed": (bent_with_its_tile, "tile/entries/001: its entries are not the signed ones"),
    "an entry left out": (cut_bundle, "tile/entries/000: it has 255 entries instead of 256"),
    "a log marked as erased": (marked_as_erased, "log-2/erased: the log was erased, and an older one was not"),
    "a log erased in secret": (erased_in_secret, f"{ORIGIN}: it was erased, and no later log has recorded that"),
    "a log in the place of another": (another_second, "log-3/entry 0: it is no link"),
    "a log removed": (without_second, "log-2 is not the folder of an audit log"),
    "the newest log removed": (without_third, "log-3: it is missing"),
    "an erased log without its checkpoint": (without_checkpoint, "checkpoint: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_left_out_in_silence(logs: Path, fault: str) -> None:
    change, said = FAULTS[fault]
    change(logs)
    with pytest.raises((Wrong, SettingsError)) as caught:
        all_read(logs)
    assert said in str(caught.value)


def test_a_hash_of_a_high_tile(tmp_path: Path) -> None:
    """Over 65,536 entries, the hashes of full tiles are in a full tile themselves."""
    store = Store(tmp_path / "audit", KEY, ORIGIN)
    entry = encode(Event(time=1.0, event="started"))
    for _ in range(66_000 // 500):
        store.commit(entry * 500)
    store.published(store.publication(()).write())
    store.close()
    reader = LogReader(tmp_path / "audit", PUBLIC)
    assert sum(1 for _ in reader.entries()) == reader.size == 66_000
    bundle, low, high = (tmp_path / "audit" / tiles.tile(level, 3 if level != 1 else 0) for level in (None, 0, 1))
    forged = [b"{}", *tiles.decode_bundle(bundle.read_bytes())[1:]]
    bundle.write_bytes(tiles.encode_bundle(forged))
    hashes = list(map(merkle.leaf_hash, forged))
    low.write_bytes(b"".join(hashes))
    while len(hashes) > 1:
        hashes = list(map(merkle.node_hash, hashes[::2], hashes[1::2]))
    row = tiles.split_tile(high.read_bytes())
    row[3] = hashes[0]
    high.write_bytes(b"".join(row))
    with pytest.raises(Wrong, match="tile/1/000: its hashes are not the signed ones"):
        list(LogReader(tmp_path / "audit", PUBLIC).entries())


# readers that are late


def test_a_recorded_erasure_is_passed_over(logs: Path) -> None:
    end = LogReader(logs, PUBLIC).size
    erased(logs, 1)
    assert all_read(logs) == everything(logs)
    assert all_read(logs, Cursor(ORIGIN, end)) == everything(logs)  # all of the erased one was exported
    with pytest.raises(SettingsError, match=f"erased before its entries from {end - 1} on were exported"):
        all_read(logs, Cursor(ORIGIN, end - 1))


def test_a_log_erased_while_it_is_read(logs: Path) -> None:
    reading = read(logs, PUBLIC)
    first = [next(reading) for _ in range(3)]
    assert [entry.index for entry in first if entry] == [0, 1, 2]
    erased(logs, 1)
    with pytest.raises(LacreError, match="was erased before its entries from 256 on were exported"):
        list(reading)


def test_a_log_erased_before_it_is_reached(logs: Path) -> None:
    reading = read(logs, PUBLIC)
    seen = [next(reading)]
    while seen[-1] is not None and seen[-1].index < LogReader(logs, PUBLIC).size - 1:
        seen.append(next(reading))
    erased(logs, 1)
    erased(logs, 2)
    with pytest.raises(LacreError, match=f"{ORIGIN}/2 was erased before its entries from 0 on were exported"):
        list(reading)


# the command, and the other end of its pipe


@contextmanager
def following(folder: Path, *options: str | Path):  # type: ignore[no-untyped-def]
    command = [sys.executable, "-P", "-m", "lacre", "audit", "export", str(folder), "--follow", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_closed_reader_ends_it(logs: Path) -> None:
    with following(logs) as process:
        assert process.stdout
        for _ in everything(logs):
            assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr and process.stderr.read() == ""


async def test_a_slow_reader_gets_every_line_of_a_gateway_that_restarts(tmp_path: Path) -> None:
    folder, cursor = tmp_path / "audit", tmp_path / "cursor"
    await opened(folder).close()
    with following(folder, "--cursor", cursor) as process:
        for life in range(3):
            log = opened(folder)
            for number in range(400):
                log.append(intent(1000 * life + number))
                log.append(outcome(1000 * life + number))
            if life < 2:
                await rotated(log)
            await log.close()
            await asyncio.sleep(0.2)  # the pipe is full meanwhile: nobody has read yet
        due, got = everything(folder), []
        while len(got) < len(due):
            line = json.loads(await asyncio.to_thread(process.stdout.readline))
            got.append((line["log"], line["index"]))
        assert got == due
        wait_until(lambda: cursor.exists() and Cursor.load(cursor) == Cursor(due[-1][0], due[-1][1] + 1), 30)


# a full disk


def keeper(root: Path, log: AuditLog, days: int | None) -> Keeper:
    return Keeper(root, log, LogTerms(keep_days=days), log=make_log(io.StringIO()), clock=lambda: 9e9)


def later(folder: Path) -> AuditLog:
    """A life of the gateway three days from now."""
    return AuditLog(folder, KEY, ORIGIN, log=make_log(io.StringIO()), clock=lambda: time.time() + 3 * 86400)


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
@pytest.mark.parametrize("refusing", [True, False])
async def test_retention_makes_room_on_a_full_disk(tmp_path: Path, refusing: bool) -> None:
    """refusing: whether the log knows that the disk is full. A small entry may still fit into the last block of a file."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        folder = disk / "audit"
        await three_logs(folder)
        log = opened(folder)
        await keeper(folder, log, None).look(seldom=True)
        assert (folder / reserve.NAME).stat().st_size >= 65536
        await log.close()
        with filled(disk):
            log = later(folder)  # the reserve is enough for the start
            assert not (folder / reserve.NAME).exists()
            await log.close()
        log = later(folder)
        await keeper(folder, log, None).look(seldom=True)
        with filled(disk):
            if refusing:
                with pytest.raises(AuditUnavailable):
                    await log.append(intent(5000))
            assert log.writable is not refusing
            await keeper(folder, log, 1).look(seldom=True)
            await until(lambda: log.writable)
            assert (folder / series.PROOF).exists() and not (folder / "tile").exists()
            await log.append(intent(5001))
            log.append(outcome(5001))
            assert not (folder / reserve.NAME).exists()  # the log needs the room more
        await log.close()
        result = verify(folder, PUBLIC)
        assert (result.wrong, result.erased) == (None, 2)


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
@pytest.mark.slow
async def test_retention_makes_room_while_the_disk_refuses_a_rotation(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        folder = disk / "audit"
        await three_logs(folder)
        await later(folder).close()
        log = later(folder)
        await keeper(folder, log, None).look(seldom=True)
        (folder / series.ASKED).touch()
        with filled(disk):
            with pytest.raises(AuditUnavailable):
                await log.append(intent(5000))
            looking = keeper(folder, log, 1)
            await asyncio.wait_for(looking.look(seldom=True), 60)
            assert (folder / series.PROOF).exists() and not (folder / "tile").exists()
            await until(lambda: log.origin == f"{ORIGIN}/4")
            await looking.look(seldom=False)
            assert not (folder / series.ASKED).exists()
        await log.close()
        result = verify(folder, PUBLIC)
        assert (result.wrong, result.erased) == (None, 2)
