"""Whoever can write to the disk changes a log; `verify` names the first place where it no longer holds. And `lacre audit`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidAudit
from lacre.evidence import checkpoints, merkle
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import b64u
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import tiles
from lacre_gateway.audit.check import SELF_CONSISTENT, AuditResult, check_receipt, verify
from lacre_gateway.audit.entries import Annex, Event, encode
from lacre_gateway.audit.reader import LogReader, Wrong
from lacre_gateway.audit.store import Store
from parts.auditing import KEY, ORIGIN, PUBLIC, intent, opened, outcome, written
from parts.bent import flipped, swapped, without
from parts.commands import run_lacre

REQUESTS = 700  # 1402 entries: five full bundles and a part of the sixth
STARTED = Event(time=1.0, event=kinds.STARTED)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "audit"
    asyncio.run(written(folder, REQUESTS))
    return folder


@pytest.fixture
def log(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "audit"))


def wrong(folder: Path, *kept: bytes) -> Wrong:
    verdict = verify(folder, PUBLIC, kept)
    assert verdict.wrong is not None
    assert verdict.words == f"does not hold: {verdict.wrong}"
    return verdict.wrong


def changed(entries: list[bytes], place: int) -> list[bytes]:
    return [*entries[:place], entries[place].replace(b"alice", b"mallo"), *entries[place + 1 :]]


def rebuilt(folder: Path, entries: list[bytes], key: Ed25519PrivateKey = KEY) -> None:
    """A log of these entries, made anew by somebody with a key."""
    shutil.rmtree(folder)
    store = Store(folder, key, ORIGIN)
    for at in range(0, len(entries), 300):
        store.commit(entries[at : at + 300])
        store.published(store.publication(()).write())
    store.close()


def all_entries(folder: Path) -> list[bytes]:
    return list(LogReader(folder, PUBLIC).entries())


def test_untouched(log: Path) -> None:
    verdict = verify(log)
    assert (verdict.wrong, verdict.size, verdict.requests, verdict.under_way) == (None, 2 * REQUESTS + 2, REQUESTS, 0)
    assert verdict.words == SELF_CONSISTENT
    kept = (log / "checkpoint").read_bytes()
    anchored = verify(log, PUBLIC, [kept])
    assert anchored.words == f"holds, and extends the kept checkpoint of {verdict.size} entries"


BUNDLES: dict[str, tuple[str, Callable[[list[bytes]], list[bytes]], str, str]] = {
    "edited": ("002", lambda entries: changed(entries, 77), f", entry {2 * 256 + 77}", ""),
    "deleted": ("001", lambda entries: without(entries, 9), "", "it has 255 entries instead of 256"),
    "deleted, and the number made up for": ("001", lambda e: [*without(e, 9), e[0]], f", entry {256 + 9}", ""),
    "reordered": ("003", lambda entries: swapped(entries, 4, 200), f", entry {3 * 256 + 4}", ""),
}


@pytest.mark.parametrize("how", BUNDLES)
def test_entries_changed(log: Path, how: str) -> None:
    bundle, change, place, why = BUNDLES[how]
    path = log / "tile/entries" / bundle
    path.write_bytes(tiles.encode_bundle(change(tiles.decode_bundle(path.read_bytes()))))
    found = wrong(log)
    assert found.place == f"tile/entries/{bundle}{place}" and why in found.why


@pytest.mark.parametrize("name", ["tile/entries/004", "tile/0/001", "tile/entries/005.p/122", "tile/0/005.p/122", "checkpoint"])
def test_file_removed(log: Path, name: str) -> None:
    (log / name).unlink()
    assert (wrong(log).place, wrong(log).why) == (name, "it is missing")


@pytest.mark.parametrize(
    ("name", "place"),
    [("tile/0/002", f"tile/entries/002, entry {2 * 256 + 3}"), ("tile/1/000.p/5", "tile/1/000.p/5, hash 3"),
     ("checkpoint", "checkpoint")],
)  # fmt: skip
def test_file_changed(log: Path, name: str, place: str) -> None:
    data = (log / name).read_bytes()
    (log / name).write_bytes(data.replace(b"audit/g1", b"audit/g2") if name == "checkpoint" else flipped(data, 3 * 32 + 5))
    assert wrong(log).place == place


def test_tiles_made_anew_over_a_changed_entry(log: Path) -> None:
    """Without the key: every tile fits, and the signed checkpoints along the way name where the change begins."""
    kept = {name: (log / name).read_bytes() for name in ("checkpoint", "checkpoints")}
    rebuilt(log, changed(all_entries(log), 801))
    for name, data in kept.items():
        (log / name).write_bytes(data)
    (log / "journal").write_bytes(b"")
    begin, end = (int(word) for word in wrong(log).place.removeprefix("entries ").split(" to "))
    assert begin <= 801 <= end


REBUILT: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str, str]] = {
    "cut": (lambda e: e[:601], "entry 601", f"it has 601 entries, the checkpoint kept elsewhere has {2 * REQUESTS + 2}"),
    "forked": (lambda e: changed(e, 1001), f"to {2 * REQUESTS + 1}", "forked"),
}


@pytest.mark.parametrize("how", REBUILT)
def test_made_anew_with_the_key(log: Path, how: str) -> None:
    """It agrees with itself. Only a checkpoint that was kept elsewhere tells, and says from where."""
    change, place, why = REBUILT[how]
    kept = (log / "checkpoint").read_bytes()
    rebuilt(log, change(all_entries(log)))
    assert verify(log, PUBLIC).words == SELF_CONSISTENT
    found = wrong(log, kept)
    assert found.place.endswith(place) and why in found.why


def test_history_that_was_not_cut_with_it(log: Path) -> None:
    history = (log / "checkpoints").read_bytes()
    rebuilt(log, all_entries(log)[:301])
    (log / "checkpoints").write_bytes(history)
    assert wrong(log).place == "entry 301"


def test_several_kept_checkpoints_close_in_on_it(log: Path) -> None:
    entries = all_entries(log)
    rebuilt(log, entries[:600])
    early = (log / "checkpoint").read_bytes()
    rebuilt(log, entries[:900])
    late = (log / "checkpoint").read_bytes()
    rebuilt(log, changed(entries, 701))
    assert wrong(log, late, early).place == "entries 600 to 899"


def test_another_key(log: Path) -> None:
    """The log, its own key file and all, made anew by somebody else."""
    kept, other = (log / "checkpoint").read_bytes(), Ed25519PrivateKey.generate()
    rebuilt(log, all_entries(log), other)
    assert verify(log).words == SELF_CONSISTENT
    assert wrong(log).place == "checkpoint"
    assert verify(log, None, [kept]).wrong is not None


def story(folder: Path, *entries: bytes) -> AuditResult:
    store = Store(folder / "story", KEY, ORIGIN)
    store.commit(list(entries))
    store.published(store.publication(()).write())
    store.close()
    return verify(folder / "story", PUBLIC)


def encoded(*entries: kinds.Entry) -> list[bytes]:
    return [data for entry in entries for data in encode(entry)]


ANNEX = Annex(request_id=f"{1:032x}", groups=("g",), scopes=(), policies=())
NAMED = hashlib.sha256(encode(ANNEX)[0]).hexdigest()


STRANGE = json.dumps({**json.loads(encode(intent(1))[0]), "prompt": "hello"}).encode()


@pytest.mark.parametrize(
    ("entries", "place", "why"),
    [
        (encoded(STARTED, intent(1), STARTED), 2, "the intent of entry 1 has no outcome"),
        (encoded(STARTED, outcome(1)), 1, "the outcome has no intent"),
        (encoded(intent(1), outcome(1), outcome(1)), 2, "a second one"),
        (encoded(intent(1), intent(1)), 1, "a second intent"),
        (encoded(ANNEX, outcome(1)), 1, "has no intent"),
        (encoded(ANNEX, intent(1)), 1, "has no intent"),
        (encoded(ANNEX, intent(2, annex=NAMED)), 1, "has no intent"),
        (encoded(intent(1, annex=NAMED)), 0, "not before it"),
        ([STRANGE], 0, "its fields are not those of an intent"),
    ],
)
def test_stories_that_do_not_hold(tmp_path: Path, entries: list[bytes], place: int, why: str) -> None:
    """Signed, and still not what a gateway writes."""
    found = story(tmp_path, *entries).wrong
    assert found is not None and found.place.endswith(f"entry {place}") and why in found.why


def test_stories_that_hold(tmp_path: Path) -> None:
    verdict = story(tmp_path, *encoded(STARTED, ANNEX, intent(1, annex=NAMED), intent(2), outcome(1), intent(3)))
    assert verdict.wrong is None and verdict.under_way == 2


async def test_the_journal_too(log: Path) -> None:
    audit = opened(log)
    for number in range(10_000, 10_005):
        await audit.append(intent(number))
    copy = Path(shutil.copytree(log, log.with_name("copy")))
    await audit.close()
    data = (copy / "journal").read_bytes()
    (copy / "journal").write_bytes(data.replace(f"{10_002:032x}".encode(), f"{10_009:032x}".encode()))
    first = 2 * REQUESTS + 2 + 1 + 2
    assert wrong(copy).why == f"entries {first} to {first} are not the signed ones"


def test_what_a_client_kept(log: Path) -> None:
    reader = LogReader(log, PUBLIC)
    old = reader.proof(801)
    check_receipt(old, reader)
    entries = all_entries(log)
    rebuilt(log, [*entries, *encoded(intent(9999), outcome(9999))])
    check_receipt(old, LogReader(log, PUBLIC))  # the log has grown
    for others, place in (
        ([*changed(entries, 801), *encode(STARTED)], "entry 801"),
        ([*changed(entries, 3), *encode(STARTED)], "entries 0 to 1401"),
        (entries[:600], "entry 600"),
    ):
        rebuilt(log, others)
        with pytest.raises(Wrong) as caught:
            check_receipt(old, LogReader(log, PUBLIC))
        assert caught.value.place == place


def test_a_receipt_that_proves_nothing(log: Path) -> None:
    reader = LogReader(log, PUBLIC)
    proof = reader.proof(5)
    other = Ed25519PrivateKey.generate()
    note = Checkpoint(ORIGIN, 1, merkle.leaf_hash(proof.entry)).sign(other, checkpoints.key_id(ORIGIN, PUBLIC))
    with pytest.raises(InvalidAudit):
        check_receipt(type(proof)(proof.entry, 0, (), note), reader)


# `lacre audit`, as an auditor uses it: on a folder of files, without a gateway


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "audit"
    asyncio.run(written(folder, 150))
    return folder


def lacre(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_lacre("audit", *args)


def test_verify(small: Path, tmp_path: Path) -> None:
    said = lacre("verify", small)
    assert (said.returncode, said.stdout.splitlines()[-1]) == (0, "self-consistent only")
    kept = tmp_path / "kept"
    kept.write_bytes((small / "checkpoint").read_bytes())
    found = json.loads(lacre("verify", small, "--checkpoint", kept, "--key", b64u(PUBLIC), "--json").stdout)
    assert (found["ok"], found["entries"], found["requests"], found["under_way"]) == (True, 302, 150, 0)
    assert found["verdict"] == "holds, and extends the kept checkpoint of 302 entries"


def test_verify_says_where(small: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    shutil.copytree(small, bent)
    bundle = bent / "tile" / "entries" / "000"
    bundle.write_bytes(bundle.read_bytes().replace(b"alice", b"mallo", 1))
    said = lacre("verify", bent)
    assert said.returncode == 1
    assert said.stdout.splitlines()[-1].startswith("does not hold: tile/entries/000, entry 1: ")
    assert lacre("verify", small, "--key", b64u(bytes(32))).returncode == 1


def test_check_receipt(small: Path, tmp_path: Path) -> None:
    proof = LogReader(small, PUBLIC).proof(7)
    for name, text in (("file", proof.text()), ("header", proof.header() + "\n")):
        (tmp_path / name).write_text(text)
        said = lacre("check-receipt", tmp_path / name, small)
        assert (said.returncode, said.stdout[:24]) == (0, "entry 7 is in the log, a")
    (tmp_path / "bent").write_text(proof.header().replace("index=7", "index=8"))
    said = lacre("check-receipt", tmp_path / "bent", small)
    assert said.returncode == 5 and "does not hold" in said.stderr


def test_prove(small: Path, tmp_path: Path) -> None:
    by_index, by_request = lacre("prove", small, "--index", "21"), lacre("prove", small, "--request", f"{10:032x}")
    assert by_index.stdout == by_request.stdout == LogReader(small, PUBLIC).proof(21).text()
    for args in ([], ["--index", "1", "--request", "x"], ["--index", "302"], ["--request", "none"]):
        assert lacre("prove", small, *args).returncode == 1


def test_tail(small: Path) -> None:
    lines = lacre("tail", small, "-n", "2").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["outcome", "event"]


def test_query(small: Path, tmp_path: Path) -> None:
    lines = lacre("query", small, "--subject", "alice", "--decision", "allow", "--limit", "3").stdout.splitlines()
    assert [json.loads(line)["index"] for line in lines] == [295, 297, 299]
    assert len(lacre("query", small, "--request", f"{4:032x}").stdout.splitlines()) == 2
    assert len(lacre("query", small, "--until", "1970-01-01T00:00:10").stdout.splitlines()) == 17
    sql = "SELECT outcome, count(*) AS requests FROM entries WHERE kind = 'outcome' GROUP BY outcome"
    said = lacre("query", small, "--sql", sql, "--index", tmp_path / "index.sqlite")
    assert json.loads(said.stdout) == {"outcome": "answered", "requests": 150}
    assert (tmp_path / "index.sqlite").stat().st_mode & 0o777 == 0o600
    for bad in ("DELETE FROM entries", "SELECT x"):
        refused = lacre("query", small, "--sql", bad)
        assert refused.returncode == 1 and "--sql" in refused.stderr


def test_no_log(tmp_path: Path) -> None:
    said = lacre("verify", tmp_path / "none")
    assert said.returncode == 1 and "is not the folder of an audit log" in said.stderr and "Traceback" not in said.stderr
