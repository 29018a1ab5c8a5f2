"""Cost of the sealed path: tokens per second at 8 streams and time to the first token, beside the bare engine's, in turns.

Both sides have the same GGUF (what `lacre up` serves by default here), prompts and settings. The bare engine is a process of
its own (`bench/runner.py`), whose tasks use the Engine protocol. The sealed one is `lacre up` (nats-server, gateway, worker)
with this process as its client.

Each has one engine thread, because two leave no core for anything else on a small machine. Figures with two are reported too.
`LACRE_BENCH_SEALED_ROUNDS` sets how many pairs; 9 otherwise, 3 for `--quick`.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2

import lacre
from bench import command
from bench.engine import Peer, model
from bench.runner import N_CTX, SLOTS, Marks, prompt, rates
from lacre_fabric.operate import settings_files

STREAMS = 8
START = 60.0  # seconds


class Sealed:
    """A client of a running `lacre up`."""

    def __init__(self, url: str, token: str, name: str) -> None:
        self.url, self.token, self.name = url, token, name

    def batch(self, n: int, tokens: int) -> dict[str, float]:
        async def run() -> dict[str, float]:
            async with lacre.AsyncClient(self.url, token=self.token, memory=lacre.VersionMemory()) as client:
                await self._stream(client, prompt(), 1)  # the manifest, and the connection
                texts = [prompt() for _ in range(n)]
                began = time.perf_counter()
                return rates(began, await asyncio.gather(*(self._stream(client, text, tokens) for text in texts)))

        return asyncio.run(run())

    async def _stream(self, client: lacre.AsyncClient, text: str, tokens: int) -> Marks:
        """When each token came. A token whose text is held back, being no whole character, comes with the next one."""
        body = {"model": self.name, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
        marks: Marks = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for event in httpx2.EventSource(response):
                if '"finish_reason":null' in event.data:
                    marks.append(time.perf_counter())
        return marks


@contextmanager
def lacre_up(path: Path, threads: int) -> Iterator[Sealed]:
    with tempfile.TemporaryDirectory(prefix="lacre-bench-") as folder:
        state = Path(folder) / "state"
        settings = state / "workers" / "default" / "worker.toml"  # what it says of a model stays
        settings.parent.mkdir(parents=True, mode=0o700)
        how = {"context": N_CTX, "slots": SLOTS, "threads": threads, "flash": True}
        settings_files.write(settings, {"models": [{"name": path.stem, "path": str(path), **how}]})
        arguments = ["up", "--state", state, "--port", "0", "--model", path]
        process = subprocess.Popen([sys.executable, "-P", "-m", "lacre", *arguments], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready "), line
            found = dict(re.findall(r"^export (LACRE_\w+)='([^']*)'$", (state / "env").read_text(), re.MULTILINE))
            yield Sealed(found["LACRE_URL"], found["LACRE_TOKEN"], path.stem)
        finally:
            process.terminate()
            process.wait(START)


def measure(quick: bool) -> command.Figures:
    """Medians over the pairs of rounds."""
    rounds = int(os.environ.get("LACRE_BENCH_SEALED_ROUNDS", "0")) or (3 if quick else 9)
    figures = pairs(1, rounds, 32 if quick else 64)
    return figures if quick else figures | {f"{name}_2_threads": value for name, value in pairs(2, rounds, 64).items()}


def pairs(threads: int, rounds: int, tokens: int) -> command.Figures:
    many: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    path = model()
    with ExitStack() as stack:
        bare = Peer("ours", sys.executable, path, threads)
        stack.callback(bare.close)
        bare.ready()
        sealed = stack.enter_context(lacre_up(path, threads))
        for turn in range(rounds + 1):
            for n, name, into in ((STREAMS, "rate", many), (1, "ttft", alone)):
                runs = {}
                for side in ("bare", "sealed") if turn % 2 == 0 else ("sealed", "bare"):
                    runs[side] = sealed.batch(n, tokens) if side == "sealed" else bare.do("batch", n=n, tokens=tokens)
                if turn > 0:  # the first one warms both up
                    into.append((runs["bare"][name], runs["sealed"][name]))
    return {
        "bare_n8": _median([a for a, _ in many]),
        "sealed_n8": _median([b for _, b in many]),
        "sealed_of_bare_n8": round(statistics.median(b / a for a, b in many), 3),
        "ttft_bare_n1_ms": _median([a for a, _ in alone]),
        "ttft_sealed_n1_ms": _median([b for _, b in alone]),
        "ttft_added_ms": _median([b - a for a, b in alone]),
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 1)


if __name__ == "__main__":
    command.run(__doc__, {"sealed": measure})
