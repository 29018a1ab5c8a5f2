"""Tokens per second of our engine beside its peers', in turns in one run: same GGUF, same threads, unique prompts.

The model is the file that users run: the type that `lacre up` serves as the default model here (`lacre model default`). Peers
get the same file. `LACRE_BENCH_MODEL=FILE` in the environment names another.

Every engine is a process of its own (`bench/runner.py`), stopped while another runs. Peers have virtual environments under
`$XDG_CACHE_HOME/lacre/peers`, made at the first run. If a peer cannot be installed, the run says so and continues without it.
`LACRE_BENCH_THREADS=N` in the environment sets the threads of all; default: every core.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import command
from lacre_backend.workshop.default_model import Surroundings, default_model

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacre"
LIMIT = 300  # seconds for one task of a peer
RUNNER = Path(__file__).with_name("runner.py")
SERVER = ["uvicorn", "fastapi", "pydantic-settings", "sse-starlette", "starlette-context", "PyYAML", "numpy", "jinja2"]
PEERS = {"xllamacpp": ["xllamacpp==2026.10.11549"], "server": [*SERVER, "typing-extensions", "diskcache"]}


def model() -> Path:
    """The file that users run: what `lacre up` serves as the default model on this machine. Or that of LACRE_BENCH_MODEL."""
    if given := os.environ.get("LACRE_BENCH_MODEL"):
        return Path(given).resolve()
    found = default_model(Surroundings(tell=lambda line: print(line, file=sys.stderr)))
    print(f"model: {found.told}", file=sys.stderr)
    return found.path


def python_of(peer: str) -> str | None:
    """The peer's interpreter, in a virtual environment of its own. None where it cannot be installed."""
    if peer in ("ours", "limit"):
        return sys.executable
    folder = CACHE / "peers" / peer
    python = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return str(python)
    wanted: list[str | Path] = list(PEERS[peer])
    if peer == "server":  # the same build of llama.cpp as ours
        wanted += sorted((CACHE / "wheels").glob("llama_cpp_python-*/*.whl"))[-1:]
    print(f"installing the peer {peer}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=False)
    if done.returncode != 0:
        return None
    (folder / ".ready").touch()
    return str(python)


class Peer:
    """An engine's process: running while it works, stopped otherwise."""

    def __init__(self, name: str, python: str, path: Path, threads: int) -> None:
        # Ours sets this for itself; a peer would inherit it.
        own = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        self.process = subprocess.Popen(
            [python, RUNNER, name, path, str(threads)],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> None:
        self._answer()
        self._signal(signal.SIGSTOP)

    def do(self, what: str, **arguments: Any) -> Any:
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        try:
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        watch = threading.Timer(LIMIT, self._signal, (signal.SIGKILL,))
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        assert line, f"the engine's process ended, or took more than {LIMIT} s"
        return json.loads(line)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


@contextmanager
def peers(names: list[str], threads: int) -> Iterator[dict[str, Peer]]:
    path = model()
    with ExitStack() as stack:
        found: dict[str, Peer] = {}
        for name in names:
            python = python_of(name)
            if python is None:
                print(f"left out: {name} could not be installed", file=sys.stderr)
                continue
            found[name] = Peer(name, python, path, threads)
            stack.callback(found[name].close)
            found[name].ready()
        yield found


def measure(quick: bool) -> command.Figures:
    """Medians over the rounds: tokens per second, prompts included unless the name says decode; milliseconds. The prompt that
    floods has 4,000 tokens; 600 where it must be quick.
    """
    threads = int(os.environ.get("LACRE_BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
    figures: command.Figures = {"threads": float(threads)}
    with peers(["ours", "xllamacpp", "limit", "server"], threads) as found:
        figures |= _rates(found, (8, 16) if quick else (1, 4, 8, 16), 32 if quick else 64, 3 if quick else 5)
        figures |= _structured(found, 96 if quick else 192, 1 if quick else 3)
        if "server" in found:
            figures["llama_cpp_server_n8"] = _round(found["server"].do("batch", n=8, tokens=32 if quick else 64)["rate"])
        for name in ("ours", "xllamacpp"):
            if name in found:
                runs = [found[name].do("warm") for _ in range(1 if quick else 3)]
                figures[f"cold_prefix_{name}_ms"] = _round(statistics.median(run["cold"] for run in runs))
                figures[f"warm_prefix_{name}_ms"] = _round(statistics.median(run["warm"] for run in runs))
        flood = found["ours"].do("flood", length=600 if quick else 4000)
        figures["gap_quiet_p95_ms"], figures["gap_flood_p95_ms"] = _round(flood["quiet"]), _round(flood["flood"])
        figures["flood_prompt_s"] = _round(flood["prompt_s"])
        if not quick:
            pairs = found["ours"].do("foreign", pairs=200)
            figures["foreign_cache_auc"] = round(auc(pairs["cached"], pairs["cold"]), 3)
    return figures | _ratios(figures)


def _rates(found: dict[str, Peer], sizes: tuple[int, ...], tokens: int, rounds: int) -> command.Figures:
    runs: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    names = [name for name in found if name != "server"]
    for turn in range(rounds):
        for n in sizes:
            for name in names if turn % 2 == 0 else names[::-1]:
                runs[name, n].append(found[name].do("batch", n=n, tokens=tokens))
    figures: command.Figures = {}
    for (name, n), results in runs.items():
        figures[f"{name}_n{n}"] = _round(statistics.median(run["rate"] for run in results))
        if name != "limit":
            figures[f"decode_{name}_n{n}"] = _round(statistics.median(run["decode"] for run in results))
            figures[f"ttft_{name}_n{n}_ms"] = _round(statistics.median(run["ttft"] for run in results))
    return figures


def _structured(found: dict[str, Peer], tokens: int, rounds: int) -> command.Figures:
    """Eight streams under a schema of 30 properties. masks_of_step: the CPU time of a step's masks, of the step's own time."""
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    names = [name for name in ("ours", "xllamacpp") if name in found]
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            runs[name].append(found[name].do("structured", n=8, tokens=tokens))
    figures: command.Figures = {f"schema_{name}_n8": _round(statistics.median(r["rate"] for r in runs[name])) for name in names}
    for name in ("masks_ms", "step_ms"):
        figures[f"schema_{name}"] = round(statistics.median(run[name] for run in runs["ours"]), 3)
    figures["masks_of_step"] = round(statistics.median(run["masks"] for run in runs["ours"]), 4)
    return figures


def _ratios(figures: command.Figures) -> command.Figures:
    wanted = {
        "x_server_n8": ("ours_n8", "llama_cpp_server_n8"),
        "x_xllamacpp_n8": ("ours_n8", "xllamacpp_n8"),
        "x_xllamacpp_n16": ("ours_n16", "xllamacpp_n16"),
        "of_limit_n8": ("decode_ours_n8", "limit_n8"),
        "of_limit_n16": ("decode_ours_n16", "limit_n16"),
        "ttft_x_xllamacpp_n8": ("ttft_ours_n8_ms", "ttft_xllamacpp_n8_ms"),
        "schema_x_xllamacpp_n8": ("schema_ours_n8", "schema_xllamacpp_n8"),
        "gap_x_quiet": ("gap_flood_p95_ms", "gap_quiet_p95_ms"),
    }
    return {
        name: round(figures[ours] / figures[theirs], 3)
        for name, (ours, theirs) in wanted.items()
        if ours in figures and figures.get(theirs)
    }


def auc(a: list[float], b: list[float]) -> float:
    """The probability that one of `a` is smaller than one of `b`: 0.5 where nothing tells them apart."""
    wins = sum((x < y) + 0.5 * (x == y) for x in a for y in b)
    return wins / (len(a) * len(b))


def _round(value: float) -> float:
    return round(value, 1)


if __name__ == "__main__":
    command.run(__doc__, {"engine": measure})
