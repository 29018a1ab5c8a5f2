"""Auditors read the logs of a gateway that writes, rotates and erases: what is true must not look like a fault."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.audit import leftovers
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.feed import read
from lacre_gateway.audit.keeping import Keeper, LogTerms
from parts.auditing import PUBLIC, intent, opened, outcome, rotated

pytestmark = pytest.mark.slow
ROTATIONS = 4
EACH = 20  # requests in each log


async def busy(folder: Path, done: threading.Event, keeping: LogTerms | None) -> None:
    log = opened(folder)
    keeper = None if keeping is None else Keeper(folder, log, keeping, log=make_log(io.StringIO()))
    for number in range(ROTATIONS * EACH):
        await log.append(intent(number))
        log.append(outcome(number))
        if number % EACH == EACH - 1:
            await rotated(log)
            if keeper is not None:
                await keeper.look(seldom=True)
    await log.close()
    done.set()


async def beside(folder: Path, keeping: LogTerms | None, *readers: Callable[[], None]) -> None:
    """Runs each reader again and again while a gateway writes, and once more at the end."""
    done = threading.Event()
    await opened(folder).close()

    def repeat(reader: Callable[[], None]) -> None:
        try:
            while not done.is_set():
                reader()
            reader()
        finally:
            done.set()

    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(asyncio.to_thread(repeat, reader))
        group.create_task(busy(folder, done, keeping))


async def test_while_it_rotates(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    following, seen = read(folder, PUBLIC, follow=True), []

    def verified() -> None:
        result = verify(folder, PUBLIC)
        assert result.wrong is None, result.words

    def exported() -> None:
        origins = [entry.origin for entry in read(folder, PUBLIC) if entry is not None]
        assert len(set(origins)) == len([one for one, two in zip(origins, [*origins[1:], ""], strict=True) if one != two])

    def followed() -> None:
        while (entry := next(following)) is not None:
            seen.append((entry.origin, entry.index))

    await beside(folder, None, verified, exported, followed)
    assert seen == [(entry.origin, entry.index) for entry in read(folder, PUBLIC) if entry is not None]
    assert verify(folder, PUBLIC).logs == ROTATIONS + 1


async def test_while_it_erases(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    lost: list[SettingsError] = []

    def verified() -> None:
        result = verify(folder, PUBLIC)
        assert result.wrong is None, result.words

    def exported() -> None:
        try:
            assert [entry for entry in read(folder, PUBLIC) if entry is not None]
        except SettingsError as exc:
            assert "was erased before its entries from" in str(exc)
            lost.append(exc)

    await beside(folder, LogTerms(keep_days=0), verified, verified, exported)
    result = verify(folder, PUBLIC)
    assert result.wrong is None and result.erased >= ROTATIONS - 1  # the clock of retention is a little late


def test_while_it_removes_folders_of_partial_tiles(tmp_path: Path) -> None:
    """A large log takes seconds to list. Meanwhile the gateway removes partial tiles, and then their folders."""
    top = tmp_path / "tile" / "entries"
    for round_ in range(3):
        folders = [top / f"x{round_:03d}" / f"{number:03d}.p" for number in range(400)]
        for each in folders:
            each.mkdir(parents=True)
        listing = threading.Event()

        def remove(folders: list[Path] = folders, listing: threading.Event = listing) -> None:
            listing.wait()
            for each in reversed(folders):
                each.rmdir()

        remover = threading.Thread(target=remove)
        remover.start()
        try:
            listing.set()
            assert leftovers.named(tmp_path) == {}
        finally:
            listing.set()
            remover.join()
