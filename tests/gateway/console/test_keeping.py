"""What the console keeps beside the audit log: minutes and an index. Both may be lost at any time."""

from __future__ import annotations

import itertools
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_gateway.audit import feed
from lacre_gateway.console import request_index
from lacre_gateway.console.drawing import HEIGHT, WIDTH, DrawnLine, draw
from lacre_gateway.console.minutes import DAMAGED, Minute, MinuteCount, MinuteStore, PoolLoad, within
from lacre_gateway.console.request_index import UNDER_WAY, RequestIndex, WantedRequests
from lacre_gateway.observe.metrics import DURATIONS, Totals
from parts.console_browser import Desk
from parts.stage import Stage, until

from .test_pages import asked


def minute(at: int, answered: int = 1) -> Minute:
    return Minute(at, answered, 0, 0, 1.0, 2.0, 10, 5, 20, 0, 1, 4, 1)


async def test_minutes_have_an_age(desk: Desk, tmp_path: Path) -> None:
    store = MinuteStore(tmp_path / "minutes" / "m.sqlite3", 1, desk.stage.gateway.log)
    for at in (0, 100, 1439, 1441, 1600):
        store.add(minute(at))
    assert [each.at for each in store.since(0)] == [1439, 1441, 1600]
    store.add(minute(1600, 7))
    assert [each.answered for each in store.since(1600)] == [7]
    store.close()
    assert (tmp_path / "minutes").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "minutes" / "m.sqlite3").stat().st_mode & 0o777 == 0o600


async def test_minutes_have_a_size(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file loses the oldest minutes, and takes the newest."""
    monkeypatch.setattr("lacre_gateway.console.minutes.MAX_PAGES", 6)
    store = MinuteStore(tmp_path / "m.sqlite3", 366, desk.stage.gateway.log)
    for at in range(1000):
        store.add(minute(at))
    kept = [each.at for each in store.since(0)]
    assert kept[-1] == 999
    assert 50 < len(kept) < 1000
    store.close()
    assert (tmp_path / "m.sqlite3").stat().st_size <= 6 * 4096


@pytest.mark.parametrize("damage", [b"not a database at all" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
async def test_a_damaged_file_is_set_aside(desk: Desk, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "m.sqlite3"
    path.write_bytes(damage)
    store = MinuteStore(path, 1, desk.stage.gateway.log)
    store.add(minute(5))
    assert [each.at for each in store.since(0)] == [5]
    store.close()
    assert (tmp_path / f"m.sqlite3{DAMAGED}").read_bytes() == damage
    assert [line["event"] for line in desk.stage.logged() if "minutes" in line["event"]] == ["minutes set aside"]


async def test_a_disk_that_takes_nothing(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = MinuteStore(tmp_path / "file" / "m.sqlite3", 1, desk.stage.gateway.log)
    store.add(minute(5))
    assert [each.at for each in store.since(0)] == [5]
    store.close()


def test_minutes_are_counted() -> None:
    now = Totals({}, (0,) * (len(DURATIONS) + 1), 0, 0, 0)
    count = MinuteCount(lambda: now, 60.0)
    assert count.sample(70.0, PoolLoad(queued=3, busy=1, slots=4, workers=1)) is None
    first = [0] * (len(DURATIONS) + 1)
    first[5] = 2
    now = Totals({"answered": 2, "refused": 1, "broken": 1}, tuple(first), 100, 40, 20)
    assert count.sample(80.0, PoolLoad(queued=1, busy=2, slots=4, workers=1)) is None
    done = count.sample(125.0, PoolLoad())
    assert done is not None
    assert (done.at, done.answered, done.refused, done.failed) == (1, 2, 1, 1)
    assert (done.prompt, done.cached, done.completion, done.queued, done.busy) == (100, 40, 20, 3, 2)
    assert 1000 * DURATIONS[4] <= (done.half or 0) <= (done.most or 0) <= 1000 * DURATIONS[5]


@given(st.lists(st.integers(0, 1000), min_size=len(DURATIONS) + 1, max_size=len(DURATIONS) + 1))
def test_shares_of_first_bytes(counts: list[int]) -> None:
    half, most = within(counts, 0.5), within(counts, 0.95)
    if not sum(counts):
        assert half is most is None
    else:
        assert half is not None and most is not None
        assert 0 <= half <= most <= 1000 * DURATIONS[-1]


@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.one_of(st.none(), st.floats(0, 1e9))), max_size=60, unique_by=lambda pair: pair[0]
    )
)
def test_drawings_stay_inside(values: list[tuple[int, float | None]]) -> None:
    drawn = draw([DrawnLine("<b>", sorted(values, key=lambda pair: pair[0]))], 3000, "a < b", "ms")
    assert "<b>" not in drawn
    assert "a &lt; b" in drawn
    numbers = [
        float(part) for word in drawn.split('points="')[1:] for pair in word.split('"')[0].split() for part in pair.split(",")
    ]
    assert all(0 <= x <= WIDTH for x in numbers[::2])
    assert all(0 <= y <= HEIGHT for y in numbers[1::2])


# The index


def opened(stage: Stage, path: Path, **options: int) -> RequestIndex:
    return RequestIndex(path, stage.folder / "audit", stage.gateway.log, **options)


async def test_the_index_follows_the_log(desk: Desk, tmp_path: Path) -> None:
    stage = desk.stage
    index = opened(stage, tmp_path / "i.sqlite3")
    await asked(stage, 2)
    index.catch_up()
    assert [one.members["outcome"] for one in index.find(WantedRequests(subject="alice"))] == ["answered", "answered"]
    trail = await asked(stage)
    await stage.outcomes(3)
    index.catch_up()
    index.catch_up()
    assert index.find(WantedRequests())[0].members["request_id"] == stage.entries("intent")[-1]["request_id"]
    assert len(index.find(WantedRequests(subject="alice"))) == len(stage.entries("intent")) == 3
    sums = index.sums("acme", 0)
    assert sum(one.requests for one in sums) == 3
    assert sum(one.completion for one in sums) == sum(entry["completion_tokens"] or 0 for entry in stage.entries("outcome"))
    index.close()
    again = opened(stage, tmp_path / "i.sqlite3")
    again.catch_up()
    assert sum(one.requests for one in again.sums("acme", 0)) == 3, "nothing is counted twice"
    assert again.find(WantedRequests(request_id=trail[0]["request_id"]))
    again.close()


async def test_a_damaged_index_is_made_again(desk: Desk, tmp_path: Path) -> None:
    stage, path = desk.stage, tmp_path / "i.sqlite3"
    await asked(stage)
    path.write_bytes(b"\0damage" * 1000)
    index = opened(stage, path)
    index.catch_up()
    assert len(index.find(WantedRequests(subject="alice"))) == 1
    index.close()


async def test_damage_that_a_search_meets(desk: Desk, tmp_path: Path) -> None:
    """As on a disk that loses pages while the gateway runs."""
    stage, path = desk.stage, tmp_path / "i.sqlite3"
    await asked(stage, 2)
    index = opened(stage, path)
    index.catch_up()
    index.close()
    with path.open("r+b") as file:
        file.seek(4096)  # the first page, with the tables' names, stays
        file.write(b"\xff" * (path.stat().st_size - 4096))
    index._database = sqlite3.connect(path, check_same_thread=False)
    assert index.find(WantedRequests(subject="alice")) == [] and "damaged" in index.fault
    assert index.sums("acme", 0) == [] and index.outcomes == [] and index.place is None
    index.catch_up()
    assert len(index.find(WantedRequests(subject="alice"))) == 2 and index.fault == ""
    index.close()


async def test_the_index_is_bounded(desk: Desk, tmp_path: Path) -> None:
    await asked(desk.stage, 5)
    index = opened(desk.stage, tmp_path / "i.sqlite3", keep=2)
    index.catch_up()
    newest = [entry["request_id"] for entry in desk.stage.entries("intent")][-2:]
    assert [one.members["request_id"] for one in index.find(WantedRequests())] == newest[::-1]
    index.close()


async def test_a_full_index_drops_its_oldest(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await asked(desk.stage)
    [one] = [
        each for each in feed.read(desk.stage.folder / "audit", None, alone=True) if each and b'"intent"' in each.data[:40]
    ]
    name = json.loads(one.data)["request_id"].encode()
    monkeypatch.setattr(request_index, "MAX_PAGES", 300)
    index = opened(desk.stage, tmp_path / "i.sqlite3")
    for begin in range(0, 4000, 40):
        numbers = range(begin, begin + 40)
        index._write([replace(one, data=one.data.replace(name, b"%032x" % number), index=number) for number in numbers])
    found = index.find(WantedRequests(), 4000)
    assert [int(each.members["request_id"], 16) for each in found] == list(range(3999, 3999 - len(found), -1))
    assert 400 < len(found) < 4000 and index.place is not None and index.place.index == 4000
    index.close()
    assert (tmp_path / "i.sqlite3").stat().st_size <= 300 * 4096


async def test_no_search_reads_the_whole_table(desk: Desk, tmp_path: Path) -> None:
    """Whatever people look for, SQLite goes to the rows by an index and sorts nothing."""
    await asked(desk.stage, 3)
    await desk.stage.outcomes(3)
    index = opened(desk.stage, tmp_path / "i.sqlite3")
    index.catch_up()
    values = {"subject": "alice", "tenant": "acme", "request_id": desk.stage.entries("intent")[0]["request_id"]}
    names = (("subject",), ("tenant",), ("subject", "tenant"), ("request_id", "tenant"), ())
    times: tuple[dict[str, float], ...] = ({}, {"since": 1.0, "until": 9e9}, {"before": 10**6})
    for named, outcome, when in itertools.product(names, (None, "answered", UNDER_WAY), times):
        wanted = WantedRequests(outcome=outcome, **{name: values[name] for name in named}, **when)  # type: ignore[arg-type]
        ran = list[str]()
        index._database.set_trace_callback(ran.append)
        found = index.find(wanted)
        index._database.set_trace_callback(None)
        [query] = [each for each in ran if each.startswith("SELECT seq")]
        steps = [step for *_, step in index._database.execute(f"EXPLAIN QUERY PLAN {query}")]
        assert not [step for step in steps if "TEMP B-TREE" in step], (wanted, steps)
        read = [step for step in steps if step.startswith(("SCAN requests", "SEARCH requests")) and "by_time" not in step]
        if named or outcome:
            assert all("INDEX" in step for step in read), (wanted, steps)
            assert len(found) == (0 if outcome == UNDER_WAY else 1 if "request_id" in named else 3), wanted
        if outcome == "answered" and "request_id" not in named:
            assert "outcome=?" in read[0], "an outcome that nearly all have is no way to the rest"
            assert all(f"{name}=?" in read[0] for name in named[:1]), (wanted, steps)
    index.close()


async def test_outcomes_are_those_of_the_index(desk: Desk, tmp_path: Path) -> None:
    index = opened(desk.stage, tmp_path / "i.sqlite3")
    assert index.outcomes == []
    async with desk.stage.http() as client:
        await desk.stage.post(client)  # there is no worker
    await asked(desk.stage, 2)
    await desk.stage.outcomes(3)
    index.catch_up()
    assert index.outcomes == sorted({entry["outcome"] for entry in desk.stage.entries("outcome")})
    assert len(index.outcomes) == 2
    index.close()


async def test_the_index_goes_on_in_the_next_log(desk: Desk, tmp_path: Path) -> None:
    stage = desk.stage
    index = opened(stage, tmp_path / "i.sqlite3")
    await asked(stage)
    await stage.outcomes(1)
    index.catch_up()
    stage.gateway.audit.rotate()
    await until(lambda: stage.gateway.audit.origin.endswith("/2"))
    async with stage.fake_worker(), stage.http() as client:
        assert (await stage.post(client)).status_code == 200
    await until(lambda: (index.catch_up(), len(index.find(WantedRequests(subject="alice"))) == 2)[1])
    logs = [one.members["log"] for one in index.find(WantedRequests(subject="alice"))]
    assert logs[0] == f"{logs[1]}/2"
    index.close()


async def test_a_log_that_cannot_be_read(desk: Desk, tmp_path: Path) -> None:
    """The index says so, and keeps what it has."""
    stage = desk.stage
    await asked(stage)
    index = opened(stage, tmp_path / "i.sqlite3")
    index.catch_up()
    index._root = tmp_path / "nowhere"
    index.catch_up()
    assert "nowhere" in index.fault
    index.close()


def test_sqlite_is_new_enough() -> None:
    """For `ON CONFLICT DO UPDATE` after a SELECT, and tables without a rowid."""
    assert sqlite3.sqlite_version_info >= (3, 35)
