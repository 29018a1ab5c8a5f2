"""`lacre audit verify` over the log of a gateway under load, while the load runs: what holds is green, every change is red.

python -m bench.audit_load [--entries N] [--before M] [--json FILE]

A whole gateway (`bench/stand.py`) answers sealed requests until its log has so many entries, as fast as it can write them. Each
request has two: an intent and an outcome. With `--before`, the gateway's own writer of logs makes the first M before it starts:
that is faster on a busy machine. From then on the load goes on behind everything. `lacre audit verify` is a process of its own.
It reads the folder that the gateway writes to, and has the gateway's key and a kept checkpoint. Then somebody with the disk,
and without the key, changes the log in its middle. Each change is undone after its verification. Two changes need a log that
nobody writes, so a copy has them: an older state of the whole log, and an older checkpoint over the newer log.

A verdict that is not due ends the run with an error. A load that a busy machine's gateway refuses begins again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import command
from bench.audit_years import fill
from bench.stand import MODELS, POOL, ROOT, Stand, run_load, stand, usage
from lacre.evidence import checkpoints, merkle
from lacre.jose.jws import b64u
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.operate.site import Site
from lacre_gateway.audit import tiles
from lacre_gateway.audit.store import Store

CONNECTIONS: Final = 32
PART: Final = 25_000  # requests of one load at most, while the log is filled
REFUSED: Final = 20  # loads that may be refused in a run; a gateway that keeps refusing writes no log
PUBLISHED: Final = 3.0  # seconds after which tiles hold everything: the gateway writes them each second
LOOK: Final = 0.05  # seconds between looks at a verification's memory
TURN: Final = 2.0  # seconds of one load behind a verification
ORIGIN: Final = "127.0.0.1/audit/g1"  # of the stand's gateway
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Verified:
    """What `lacre audit verify` said and took. rss: bytes, at most."""

    ok: bool
    verdict: str
    entries: int
    wall: float
    cpu: float
    rss: int


def verify(folder: Path, key: str, kept: Path) -> Verified:
    arguments = ["audit", "verify", str(folder), "--key", key, "--checkpoint", str(kept), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lacre", *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    most, ended = 0, 0
    while not ended:
        # What `wait4` says of the memory counts that of the process that started it, too.
        most = max(most, _most_memory(process.pid))
        time.sleep(LOOK)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    assert process.stdout is not None
    with process.stdout:
        found: dict[str, Any] = json.loads(process.stdout.read())
    if (process.returncode == 0) is not found["ok"]:
        raise SystemExit(f"it said {found}, and ended with {process.returncode}")
    cpu = used.ru_utime + used.ru_stime
    return Verified(found["ok"], found["verdict"], found["entries"], wall, cpu, most)


def _most_memory(pid: int) -> int:
    """The most bytes of memory until now; 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM")), 0)


@dataclass(slots=True)
class Loads:
    """One load after another on a gateway. requests: of those that came to their end. refused: how many did not."""

    served: Stand
    requests: int = 0
    refused: int = 0

    def one(self, **limits: Any) -> None:
        try:
            self.requests += run_load(self.served.load(_KIB, CONNECTIONS, **limits))["requests"]
        except SystemExit:
            self.refused += 1
            if self.refused > REFUSED:
                raise

    def fill(self, log: Path, entries: int) -> None:
        """Until the log has so many."""
        while (missing := entries - size_of(log)) > 0:
            self.one(requests=min(PART, -(-missing // 2)))
            time.sleep(PUBLISHED if missing <= 2 * PART else 0)

    @contextmanager
    def behind(self) -> Iterator[None]:
        """While it runs, requests run."""
        over, failures = threading.Event(), list[BaseException]()

        def turn_after_turn() -> None:
            try:
                while not over.is_set():
                    self.one(seconds=TURN)
            except (SystemExit, OSError, ValueError) as exc:  # told to the one who waits
                failures.append(exc)

        thread = threading.Thread(target=turn_after_turn)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failures:
            raise SystemExit(f"the load ended: {failures[0]}")


@contextmanager
def replaced(*changes: tuple[Path, bytes]) -> Iterator[None]:
    """While it runs, these files of the log hold something else."""
    before = [(path, path.read_bytes()) for path, _ in changes]
    try:
        for path, data in changes:
            path.write_bytes(data)
        yield
    finally:
        for path, data in before:
            path.write_bytes(data)


def _middle(folder: Path, size: int) -> tuple[Path, Path, list[bytes]]:
    """The bundle in the middle of the log, its tile of hashes, and its entries."""
    index = size // tiles.WIDTH // 2
    bundle = folder / tiles.tile(None, index)
    return bundle, folder / tiles.tile(0, index), tiles.decode_bundle(bundle.read_bytes())


@contextmanager
def a_byte(folder: Path, size: int) -> Iterator[None]:
    """One byte of one entry."""
    bundle, _, entries = _middle(folder, size)
    changed = bytearray(entries[100])
    changed[len(changed) // 2] ^= 1
    with replaced((bundle, tiles.encode_bundle([*entries[:100], bytes(changed), *entries[101:]]))):
        yield


@contextmanager
def an_entry(folder: Path, size: int) -> Iterator[None]:
    """An entry is another one's copy, and its hash is right."""
    bundle, row, entries = _middle(folder, size)
    changed = [*entries[:100], entries[98], *entries[101:]]
    with replaced((bundle, tiles.encode_bundle(changed)), (row, b"".join(map(merkle.leaf_hash, changed)))):
        yield


@contextmanager
def a_drop(folder: Path, size: int) -> Iterator[None]:
    """An entry is gone, and its hash too."""
    bundle, row, entries = _middle(folder, size)
    changed = [*entries[:100], *entries[101:]]
    with replaced((bundle, tiles.encode_bundle(changed)), (row, b"".join(map(merkle.leaf_hash, changed)))):
        yield


@contextmanager
def a_swap(folder: Path, size: int) -> Iterator[None]:
    """Two entries changed places, and their hashes too."""
    bundle, row, entries = _middle(folder, size)
    changed = [*entries[:100], entries[101], entries[100], *entries[102:]]
    with replaced((bundle, tiles.encode_bundle(changed)), (row, b"".join(map(merkle.leaf_hash, changed)))):
        yield


CHANGES: Final = {"a changed byte": a_byte, "a changed entry": an_entry, "a dropped entry": a_drop, "two swapped": a_swap}


def copied(log: Path, target: Path) -> Path:
    """The log as it is now. Nobody may write to it. Full tiles never change, so links are enough for them."""
    for path in sorted(log.rglob("*")):
        there = target / path.relative_to(log)
        if path.is_dir():
            there.mkdir(parents=True)
        elif path.is_relative_to(log / "tile"):
            os.link(path, there)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    return target


def size_of(log: Path) -> int:
    return checkpoints.parse((log / "checkpoint").read_bytes()).size


def due(what: str, found: Verified, *, holds: bool, says: str) -> Verified:
    if found.ok is not holds or says not in found.verdict:
        raise SystemExit(f"{what}: {found.verdict}")
    print(f"{what:<26}{found.wall:>8.1f} s {found.cpu:>8.1f} s of CPU  {found.verdict}", flush=True)
    return found


def written_before(folder: Path, entries: int) -> None:
    """The beginning of the log that the gateway of the stand in this folder continues."""
    site = Site(folder / "site", {POOL: MODELS})
    site.create()
    store = Store(site.folder / "gateway" / "audit", read_ed25519(site.folder / "gateway" / "grant.pem"), ORIGIN)
    fill(store, entries // 2)
    store.close()


def measure(entries: int, before: int = 0) -> command.Figures:
    with tempfile.TemporaryDirectory(prefix="lacre-audit-") as name, ExitStack() as stack:
        if before:
            written_before(Path(name), before)
        served = stack.enter_context(stand(Path(name)))
        log, beside = served.site.folder / "gateway" / "audit", Path(name)
        key = b64u(served.site.grant_keys.public()[0])
        with served.answering(1):
            began = time.perf_counter()
            loads = Loads(served)
            loads.fill(log, (before + entries) // 2)
            early = copied(log, beside / "early")
            loads.fill(log, entries)
            seconds = time.perf_counter() - began
            size = size_of(log)
            bytes_ = sum(path.stat().st_size for path in log.rglob("*") if path.is_file())
            print(f"{size} entries, {bytes_ / 2**20:.0f} MiB, in {seconds:.0f} s", flush=True)
            late = copied(log, beside / "late")
            kept = beside / "kept"
            shutil.copy(log / "checkpoint", kept)
            begun = loads.requests
            with loads.behind():
                green = due("as it is", verify(log, key, kept), holds=True, says=f"extends the kept checkpoint of {size}")
                for what, change in CHANGES.items():
                    with change(log, size):
                        due(what, verify(log, key, kept), holds=False, says="does not hold: ")
                due("rolled back", verify(early, key, kept), holds=False, says="cut or rolled back")
                (late / "checkpoint").write_bytes((early / "checkpoint").read_bytes())
                due("its checkpoint is old", verify(late, key, kept), holds=False, says="does not hold: ")
                again = due("put in order again", verify(log, key, kept), holds=True, says="extends the kept")
                if not size <= green.entries < again.entries:
                    raise SystemExit("nothing was written while it was verified")
            figures: command.Figures = {
                "entries": size,
                "log_mib": bytes_ / 2**20,
                "written_before": before,
                "entries_per_s": (size - before) / seconds,
                "verify_s": green.wall,
                "verify_cpu_s": green.cpu,
                "verify_rss_mb": green.rss / 2**20,
                "verify_us_per_entry": green.cpu / green.entries * 1e6,
                "requests_meanwhile": loads.requests - begun,
                "loads_refused": loads.refused,
                "gateway_rss_mb": usage(served.process.pid).rss / 2**20,
            }
    return {name: round(float(value), 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--before", type=int, default=0, metavar="M", help="how many of them to write before the load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    print(command.machine())
    figures = measure(arguments.entries, arguments.before)
    for name, value in figures.items():
        print(f"  {name:36} {value:>12}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
