"""Logs that continue each other: rotation, crashes in it, erasure, and what `verify` finds in the chain."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_gateway.audit import chain, series, tiles
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import encode, parse
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, erased, intent, opened, outcome, rotated
from parts.bent import flipped
from parts.waiting import until


async def restarted(folder: Path) -> None:
    await opened(folder).close()


async def three_logs(folder: Path) -> None:
    """Two rotations; a request is open during the first, and another during both."""
    log = opened(folder)
    for number in range(300):
        log.append(intent(number))
        log.append(outcome(number))
    await log.append(intent(1000))
    await log.append(intent(1001))
    await rotated(log, "acme/ada")
    await log.append(outcome(1000))
    await rotated(log)
    await log.append(outcome(1001))
    await log.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "audit"
    asyncio.run(three_logs(folder))
    return folder


@pytest.fixture
def logs(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "audit"))


def read(root: Path) -> list[list[dict[str, object]]]:
    return [[parse(entry) for entry in reader.entries()] for reader in chain.readers(root, PUBLIC)]


def wrong(root: Path, *kept: bytes) -> Wrong:
    found = verify(root, PUBLIC, kept).wrong
    assert found is not None
    return found


def test_each_log_links_to_the_one_before(logs: Path) -> None:
    first, second, third = read(logs)
    ends = [(log[-1]["event"], log[-1]["target"], log[-1]["actor"]) for log in (first, second)]
    assert ends == [("rotated", f"{ORIGIN}/2", "acme/ada"), ("rotated", f"{ORIGIN}/3", None)]
    assert [(log[0]["kind"], log[0]["open"]) for log in (second, third)] == [("link", 2), ("link", 1)]
    assert second[0]["checkpoint"] == (logs / "checkpoint").read_text()
    assert third[0]["checkpoint"] == (logs / "log-2/checkpoint").read_text()
    assert not list(logs.glob("**/journal.old")) and not (logs / "journal").exists()
    result = verify(logs, PUBLIC)
    assert (result.wrong, result.logs, result.requests, result.under_way, result.origin) == (None, 3, 302, 0, f"{ORIGIN}/3")


def test_a_kept_checkpoint_of_any_log_anchors(logs: Path) -> None:
    old = (logs / "checkpoint").read_bytes()
    assert verify(logs, PUBLIC, [old]).words == f"holds, and extends the kept checkpoint of 604 entries of {ORIGIN}"
    new = (logs / "log-3/checkpoint").read_bytes()
    assert verify(logs, PUBLIC, [old, new]).anchor == f"{ORIGIN}/3"


def test_the_log_goes_on_after_a_start(logs: Path) -> None:
    async def go_on() -> None:
        log = opened(logs)
        assert log.origin == f"{ORIGIN}/3"
        await log.append(intent(5000))
        await log.close()
        await opened(logs).close()

    asyncio.run(go_on())
    assert verify(logs, PUBLIC).wrong is None
    assert [
        entry["outcome"] for entry in read(logs)[2] if entry.get("request_id") == f"{5000:032x}" and "outcome" in entry
    ] == ["interrupted"]


def test_a_request_open_over_a_rotation_is_interrupted_without_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "audit"

    async def cut_off() -> None:
        log = opened(folder)
        await log.append(intent(7))
        await rotated(log)
        await log.close()
        (folder / "log-2/open").unlink()
        await restarted(folder)

    asyncio.run(cut_off())
    assert [entry["outcome"] for entry in read(folder)[1] if entry["kind"] == "outcome"] == ["interrupted"]
    assert verify(folder, PUBLIC).wrong is None


def test_a_crash_between_the_end_and_the_next_log(logs: Path) -> None:
    """The old log has ended, and the new one is not there: the next start makes it."""
    shutil.rmtree(logs / "log-3")
    (logs / ".log-next").mkdir()
    (logs / ".log-next/half").write_bytes(b"half")
    assert wrong(logs).place == "log-3" and "missing" in wrong(logs).why
    asyncio.run(restarted(logs))
    result = verify(logs, PUBLIC)
    assert (result.wrong, result.logs) == (None, 3)
    assert not (logs / ".log-next").exists()


def test_a_rotation_that_the_disk_refuses_is_tried_again(tmp_path: Path) -> None:
    folder, said = tmp_path / "audit", io.StringIO()

    async def refused() -> None:
        log = opened(folder, said=said)
        await log.append(intent(1))
        (folder / ".log-next").write_bytes(b"a file where the folder must be")
        log.rotate()
        await until(lambda: "cannot be rotated" in said.getvalue())
        (folder / ".log-next").unlink()
        await until(lambda: log.origin == f"{ORIGIN}/2")
        await log.append(outcome(1))
        await log.close()

    asyncio.run(refused())
    result = verify(folder, PUBLIC)
    assert (result.wrong, result.logs, result.requests) == (None, 2, 1)


def without_second(root: Path) -> None:
    shutil.rmtree(root / "log-2")


def without_third(root: Path) -> None:
    shutil.rmtree(root / "log-3")


def other_second(root: Path) -> None:
    """A log made anew by the holder of the key, after the third was signed over the true one."""
    shutil.rmtree(root / "log-2")
    store = Store(root / "log-2", KEY, f"{ORIGIN}/2")
    store.commit([next(iter(LogReader(root / "log-3", PUBLIC).entries()))])
    store.published(store.publication(()).write())
    store.close()


def bent_second(root: Path) -> None:
    bundle = next((root / "log-2/tile/entries").glob("000.p/*"))
    bundle.write_bytes(bundle.read_bytes().replace(b"interr", b"answer").replace(b"answered", b"answerEd"))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a log removed": (without_second, "log-2/key"),
    "the newest removed": (without_third, "log-3"),
    "a log forged": (other_second, "log-2/tile/entries/000.p/1, entry 0"),
    "an entry changed": (bent_second, "log-2/tile/entries/000.p/3, entry 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_chain(logs: Path, fault: str) -> None:
    change, place = FAULTS[fault]
    change(logs)
    assert wrong(logs).place == place


def test_an_erased_log_leaves_the_chain_provable(logs: Path) -> None:
    kept = (logs / "checkpoint").read_bytes()
    erased(logs, 1)
    assert not (logs / "tile").exists() and b"alice" not in b"".join(
        path.read_bytes() for path in logs.iterdir() if path.is_file()
    )
    result = verify(logs, PUBLIC, [kept])
    assert (result.wrong, result.logs, result.erased, result.under_way) == (None, 3, 1, 0)
    assert result.words == f"holds, and extends the kept checkpoint of 604 entries of {ORIGIN}"
    erased(logs, 2)
    result = verify(logs, PUBLIC)
    assert (result.wrong, result.erased) == (None, 2)
    asyncio.run(restarted(logs))  # the gateway goes on
    assert verify(logs, PUBLIC).wrong is None


def test_a_half_erased_log(logs: Path) -> None:
    erased(logs, 1)
    (logs / "tile").mkdir()
    (logs / "tile/rest").write_bytes(b"rest")
    assert series.unfinished(logs)
    assert verify(logs, PUBLIC).wrong is None
    series.erase(logs, PUBLIC)
    assert not series.unfinished(logs) and not (logs / "tile").exists()


def test_an_erasure_that_nobody_recorded(logs: Path) -> None:
    erased(logs, 1, told=False)
    assert wrong(logs).why == "it was erased, and no later log has recorded that"


def test_a_log_erased_out_of_turn(logs: Path) -> None:
    erased(logs, 2)
    assert wrong(logs).place == "log-2/erased"


@pytest.mark.parametrize("name", ["erased", "checkpoint"])
def test_remains_of_an_erased_log_changed(logs: Path, name: str) -> None:
    erased(logs, 1)
    (logs / name).write_bytes(flipped((logs / name).read_bytes(), 40))
    assert wrong(logs).place == name


def test_a_kept_checkpoint_of_an_erased_log_that_it_contradicts(logs: Path, tmp_path: Path) -> None:
    other = Store(tmp_path / "other", KEY, ORIGIN)
    other.commit([*encode(intent(1))])
    short = other._note
    for number in range(700):
        other.commit([*encode(intent(number + 2))])
    long = other._note
    other.close()
    erased(logs, 1)
    assert verify(logs, PUBLIC, [short]).uncompared == 1
    assert "rolled back" in wrong(logs, long).why


# partial tiles that wider ones replaced


@pytest.mark.parametrize("name", ["tile/entries/000.p/7", "tile/0/000.p/7", "tile/entries/001.p/9", "tile/1/000.p/1"])
def test_a_superseded_bundle(logs: Path, name: str) -> None:
    reader = LogReader(logs, PUBLIC)
    number, width = int(name.split("/")[2][:3]), int(name.rpartition("/")[2])
    entries = list(reader.entries(256 * number, 256 * number + width))
    if "entries" in name:
        data = tiles.encode_bundle(entries)
    else:
        level = int(name.split("/")[1])
        data = b"".join(reader.node(8 * level, 256 * number + at) for at in range(width))
    path = logs / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert verify(logs, PUBLIC).wrong is None
    path.write_bytes(data[:-3] + bytes(3))
    assert (wrong(logs).place, wrong(logs).why) == (name, "it does not agree with the log, which has a wider one")


def test_files_that_belong_to_no_log(logs: Path) -> None:
    (logs / "tile/entries/000.p").mkdir(exist_ok=True)
    for name in ("tile/entries/000.p/256", "tile/entries/readme", "tile/0/9"):
        (logs / name).write_bytes(b"")
        assert (wrong(logs).place, wrong(logs).why) == (name, "no such file belongs to a log")
        (logs / name).unlink()
    (logs / "tile/entries/900").write_bytes(tiles.encode_bundle([b"{}"] * 256))
    assert wrong(logs).place == "tile/entries/900" and "copied while the gateway wrote it" in wrong(logs).why


def test_an_empty_folder_is_no_next_log(logs: Path) -> None:
    (logs / "log-9").mkdir()
    with pytest.raises(SettingsError, match="log-9 is no log"):
        opened(logs)
    assert list((logs / "log-9").iterdir()) == []
