"""One gateway process with everything on, beside nginx's `proxy_pass` and gateways for models, in turns in one run.

The gateway authenticates signed tokens of 64 subjects, decides by policy, reserves and settles. It signs grants and
checkpoints, syncs its audit log to disk, and settles by the pool's receipts. `bench/consumer.py` answers. Peers do none of
that, but LiteLLM and SMG check a key. With `--quick` the peers are nginx and Portkey alone. Each request has an `enc` of its
own. Sizes (61 around the nominal one), subjects and models (3) change with each request, so that no cache sees one key for
ever. Every tenth request is the last of its connection. All are warm before they are measured. `first` is the time to the
first byte of an answer. All other times are to its end.

- `cpu_us_per_request`, `portkey_cpu_us_per_request`: CPU time of the process (all threads, user and system) for a request of
  1 KiB answered with one record, at 16 at once. The goal is half of a warm Portkey's (`portkey_cpu_ratio`, at most 0.5).
- `litellm_rps_ratio`: requests a second, times LiteLLM's. The goal is 20.
- `xwing_cpu_us_per_request`: the same under X-Wing, whose requests are 1 KiB longer.
- `records_per_s_c16`: 20 records of 512 bytes an answer; the goal is 30,000.
- `p50_c1_1k_ms`: to the first byte, one request at a time; the goal is 1.3. It includes `sync_p50_ms`, the time of one sync of
  the disk.
- `p50_c1_1m_ms`: the same with 1 MiB, to the end of the answer. `mib_ratio` compares it with 1 KiB; the goal is at most 4.
- `rss_mb`: of the gateway's process at the end.
- `subjects_6400_*`: with 6,400 subjects. `processes_4_*`: with 4 processes, whose CPU time counts together. Not with `--quick`.

`--python PATH` runs a second gateway under another Python, in turns with the first: `python_*`. PATH: of a virtual environment
with the packages of `requirements/gateway.lock`. The images' Python is built with profile-guided optimisation; one that pyenv
built usually is not.

`--soak` instead measures memory, and takes some minutes. It shows whether memory is flat over 100,000 requests
(`soak_rss_spread`, goal ± 5 %), and the use of 2,000 open streams (`streams_rss_mb`, goal below 300).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench import command
from bench.peers import Peer, peers
from bench.stand import SUBJECTS, Load, Stand, begun_load, run_load, stand, usage
from lacre.wire.header import Kem

MANY_SUBJECTS, MANY_PROCESSES = 6400, 4
WARM_SECONDS = 3.0  # first requests allocate, draw leases, and are compiled by Portkey's Node.js
SIZES = {"1k": 2**10, "16k": 2**14, "256k": 2**18, "1m": 2**20}
CONNECTIONS = (1, 16, 64)
ROUNDS = 3  # turns of a short run in which the machine's other work cannot favour one side
SOAK, SOAK_PARTS, WARM = 100_000, 20, 10_000
STREAMS = 2000
FLAT_FROM = 4  # parts of a soak after which memory must not grow: until then caches fill


def measured(load: Load, pid: int) -> command.Figures:
    """The load's figures, and the CPU time in microseconds that each request took of the process."""
    before = usage(pid).cpu
    figures = run_load(load)
    return {**figures, "cpu_us": (usage(pid).cpu - before) / figures["requests"] * 1e6}


def medians(runs: list[command.Figures]) -> command.Figures:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def matrix(served: Stand, seconds: float, quick: bool) -> command.Figures:
    """One record an answer, each size at each concurrency."""
    figures: command.Figures = {}
    for label, size in SIZES.items():
        for connections in CONNECTIONS:
            if quick and (label not in ("1k", "1m") or connections == 64):
                continue
            found = measured(served.load(size, connections, seconds=seconds), served.process.pid)
            for name in ("rps", "first_p50_ms", "p50_ms", "p99_ms", "cpu_us"):
                figures[f"{label}_c{connections}_{name}"] = found[name]
    return figures


def beside(served: Stand, running: dict[str, Peer | Stand], seconds: float) -> command.Figures:
    """Ours and the peers in turns: 1 KiB, one record, 16 at once."""
    ours: list[command.Figures] = []
    others: dict[str, list[command.Figures]] = {name: [] for name in running}
    for peer in running.values():
        run_load(peer.load(2**10, 16, seconds=WARM_SECONDS))
    for _ in range(ROUNDS):
        ours.append(measured(served.load(2**10, 16, seconds=seconds), served.process.pid))
        for name, peer in running.items():
            others[name].append(measured(peer.load(2**10, 16, seconds=seconds), peer.pid))
    mine = medians(ours)
    figures = {"rps_c16_1k": mine["rps"], "cpu_us_per_request": mine["cpu_us"], "p99_c16_1k_ms": mine["p99_ms"]}
    for name, runs in others.items():
        found = medians(runs)
        figures |= {f"{name}_rps_c16": found["rps"], f"{name}_cpu_us_per_request": found["cpu_us"]}
        figures |= {f"{name}_cpu_ratio": mine["cpu_us"] / found["cpu_us"], f"{name}_rps_ratio": mine["rps"] / found["rps"]}
    return figures


def alone(label: str, seconds: float, *, first: int, subjects: int = SUBJECTS, processes: int = 1) -> command.Figures:
    """Another gateway by itself: 1 KiB, one record, 16 at once. first: requests before it is measured."""
    with (
        tempfile.TemporaryDirectory() as name,
        stand(Path(name), subjects=subjects, processes=processes) as served,
        served.answering(1),
    ):
        run_load(served.load(2**10, 16, requests=first))
        found = measured(served.load(2**10, 16, seconds=2 * seconds), served.process.pid)
    return {f"{label}_cpu_us_per_request": found["cpu_us"], f"{label}_rps_c16": found["rps"]}


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def sync_ms(folder: Path) -> float:
    """What syncing the bytes of a group commit to the disk of the audit log takes, by itself."""
    handle, times = os.open(folder / "sync", os.O_RDWR | os.O_CREAT), []
    for _ in range(200):
        began = time.perf_counter()
        os.write(handle, bytes(1500))
        os.fdatasync(handle)
        times.append(time.perf_counter() - began)
    os.close(handle)
    return statistics.median(times) * 1e3


def measure(quick: bool, *, python: Path | None = None) -> command.Figures:
    seconds = 1.5 if quick else 5.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with stand(folder) as served, peers(folder, quick=quick) as found, ExitStack() as more:
            running: dict[str, Peer | Stand] = dict(found)
            if python is not None:
                running["python"] = other = more.enter_context(stand(more.enter_context(_folder()), python=python))
                more.enter_context(other.answering(1))
            with served.answering(1):
                run_load(served.load(2**10, 16, seconds=WARM_SECONDS))
                figures = beside(served, running, seconds)
                xwing = measured(served.load(2**11, 16, kem=Kem.XWING, seconds=seconds), served.process.pid)
                cells = matrix(served, seconds, quick)
            with served.answering(20):
                many = measured(served.load(2**10, 16, seconds=2 * seconds), served.process.pid)
            figures |= {
                "xwing_cpu_us_per_request": xwing["cpu_us"],
                "records_per_s_c16": 20 * many["rps"],
                "records_cpu_us_per_request": many["cpu_us"],
                "p50_c1_1k_ms": cells["1k_c1_first_p50_ms"],
                "p50_c1_1m_ms": cells["1m_c1_p50_ms"],
                "mib_ratio": cells["1m_c1_p50_ms"] / cells["1k_c1_p50_ms"],
                "rss_mb": usage(served.process.pid).rss / 2**20,
                "sync_p50_ms": sync_ms(folder),
            }
    if not quick:
        figures |= alone(f"subjects_{MANY_SUBJECTS}", seconds, subjects=MANY_SUBJECTS, first=2 * MANY_SUBJECTS)
        figures |= alone(f"processes_{MANY_PROCESSES}", seconds, processes=MANY_PROCESSES, first=WARM)
    return {name: round(float(value), 3) for name, value in (figures | cells).items()}


def soak() -> command.Figures:
    """Memory over many requests, and of many open streams."""
    with tempfile.TemporaryDirectory() as name, stand(Path(name)) as served:
        pid = served.process.pid
        with served.answering(1):
            run_load(served.load(2**10, 16, requests=WARM))
            sizes = []
            for _ in range(SOAK_PARTS):
                run_load(served.load(2**10, 16, requests=SOAK // SOAK_PARTS))
                sizes.append(usage(pid).rss / 2**20)
                print(f"  {sizes[-1]:.1f} MB", file=sys.stderr, flush=True)
        late = sizes[FLAT_FROM:]
        with served.answering(1, hold=True):
            open_streams(served)
            streams = usage(pid).rss / 2**20
    middle = (max(late) + min(late)) / 2
    return {
        "soak_rss_first_mb": round(sizes[0], 1),
        "soak_rss_last_mb": round(sizes[-1], 1),
        "soak_rss_spread": round((max(late) - min(late)) / 2 / middle, 4),
        "streams_rss_mb": round(streams, 1),
    }


def open_streams(served: Stand) -> None:
    """Returns while they are all open, and have been for some seconds; they end with the load's process."""
    with begun_load(served.load(2**10, STREAMS, reopen=0, requests=STREAMS, hold=True)) as figures:
        assert figures["requests"] == STREAMS
        time.sleep(5)  # beats come, and nobody is lost


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--python", type=Path)
    own, sys.argv[1:] = parser.parse_known_args()
    if own.soak:
        command.run(__doc__, {"soak": lambda _: soak()})
    else:
        command.run(__doc__, {"gateway": partial(measure, python=own.python)})


if __name__ == "__main__":
    main()
