"""One engine in a process of its own, for `bench.engine`: reads a task as a JSON line, does it, writes its figures as one.

It runs in the peer's virtual environment, so only `ours` imports Lacre.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

N_CTX = 4608
SLOTS = 16
STORY = "Write a long story about the harbour, the lighthouse keeper, and the ship that came back after many years. Begin: "
SCHEMA_PROPERTIES = 30
# Half of them strings, which end by the model's will; a schema as an extraction has it.
SCHEMA = {
    "type": "object",
    "properties": {
        f"field_{i}": [
            {"type": "string", "maxLength": 24},
            {"type": "boolean"},
            {"type": "integer"},
            {"enum": ["low", "middle", "high"]},
        ][i % 4]
        for i in range(SCHEMA_PROPERTIES)
    },
    "required": [f"field_{i}" for i in range(SCHEMA_PROPERTIES)],
    "additionalProperties": False,
}
Marks = list[float]  # when each token of a stream came, by the clock


def prompt() -> str:
    return secrets.token_hex(8) + " " + STORY


def long_text(tokens: int) -> str:
    """Ordinary words, about one token each."""
    return secrets.token_hex(8) + " " + "the sea and the sky are wide and blue at the end of the day " * (tokens // 14)


def rates(began: float, streams: list[Marks]) -> dict[str, float]:
    """decode: the rate between the last stream's first token and the first one's last, where nothing else is done."""
    total = sum(map(len, streams))
    begin, end = max(marks[0] for marks in streams), min(marks[-1] for marks in streams)
    inside = sum(begin < mark <= end for marks in streams for mark in marks)
    return {
        "rate": total / (max(marks[-1] for marks in streams) - began),
        "decode": inside / (end - begin) if end > begin else 0.0,
        "ttft": statistics.median(marks[0] - began for marks in streams) * 1e3,
    }


class Ours:
    def __init__(self, path: str, threads: int) -> None:
        global Sampling, Task, Token, grammar  # noqa: PLW0603 - not there in a peer's environment
        from lacre_backend.api.schema.grammar import grammar  # noqa: PLC0415
        from lacre_backend.engine.generate import LlamaEngine, LlamaSettings  # noqa: PLC0415
        from lacre_backend.engine.protocol import Sampling, Task, Token  # noqa: PLC0415

        settings = LlamaSettings(n_ctx=N_CTX, slots=SLOTS, threads=threads, flash=True)
        self.engine = LlamaEngine(Path(path), name="bench", digest="", settings=settings)

    def batch(self, n: int, tokens: int) -> dict[str, float]:
        async def run() -> dict[str, float]:
            texts = [prompt() for _ in range(n)]
            began = time.perf_counter()
            return rates(began, await asyncio.gather(*(self.stream(text, tokens) for text in texts)))

        return asyncio.run(run())

    def structured(self, n: int, tokens: int) -> dict[str, float]:
        """As `batch`, each answer under `SCHEMA`. masks: their CPU time, of the time that the steps took together."""

        async def run() -> dict[str, float]:
            texts = [prompt() for _ in range(n)]
            began = time.perf_counter()
            compiled = [self.engine.grammar(grammar(SCHEMA)) for _ in range(n)]
            steps = self.engine.steps
            works = (self.stream(t, tokens, held=c) for t, c in zip(texts, compiled, strict=True))
            found = rates(began, await asyncio.gather(*works))
            seconds = time.perf_counter() - began
            steps = self.engine.steps - steps
            masks = sum(each.seconds for each in compiled)
            return found | {"masks": masks / seconds, "masks_ms": masks / steps * 1e3, "step_ms": seconds / steps * 1e3}

        return asyncio.run(run())

    async def stream(
        self,
        text: str,
        tokens: int,
        scope: bytes | None = None,
        endless: str = "",
        marks: Marks | None = None,
        held: Any = None,
    ) -> Marks:
        """endless: the id of a task that ends only at its limit. marks: filled as the tokens come. held: to a grammar."""
        marks = [] if marks is None else marks
        ids = tuple(self.engine.tokenize(text))
        never = dict.fromkeys((token.id for token in self.engine.model.control_tokens), -1000.0) if endless else {}
        sampling = Sampling(temperature=0, logit_bias=never, grammar=held)
        task = Task(endless or secrets.token_hex(8), ids, tokens, sampling=sampling, cache_scope=scope)
        try:
            async for event in self.engine.submit(task):
                if isinstance(event, Token):
                    marks.append(time.perf_counter())
        finally:
            self.engine.cancel(task.id)
        return marks

    def warm(self) -> dict[str, float]:
        text = long_text(540)
        scope = secrets.token_bytes(8)

        def first(tail: str) -> float:
            began = time.perf_counter()
            return (asyncio.run(self.stream(text + tail, 1, scope))[0] - began) * 1e3

        return {"cold": first("one"), "warm": statistics.median(first(tail) for tail in ("two", "three", "four"))}

    def foreign(self, pairs: int) -> dict[str, Any]:
        """TTFT of a prompt that another scope has cached, and of one that nobody has, in turns."""
        cached: list[float] = []
        cold: list[float] = []
        for i in range(pairs):
            known, fresh = long_text(150), long_text(150)
            asyncio.run(self.stream(known, 1, b"owner"))
            turns = [(known, cached), (fresh, cold)]
            for text, into in turns if i % 2 else turns[::-1]:
                began = time.perf_counter()
                into.append(asyncio.run(self.stream(text, 1, secrets.token_bytes(8)))[0] - began)
        return {"cached": cached, "cold": cold}

    def flood(self, length: int) -> dict[str, float]:
        """p95 of the time between tokens of 7 streams: quiet, and while a prompt of `length` tokens is taken in."""

        async def short(number: int, marks: list[Marks]) -> None:
            """One answer after another, each long enough for its prompt to be a rare thing."""
            for turn in itertools.count():
                marks.append([])
                await self.stream(prompt(), 256, endless=f"short{number}.{turn}", marks=marks[-1])

        async def run() -> dict[str, float]:
            marks: list[Marks] = []
            streams = [asyncio.create_task(short(number, marks)) for number in range(7)]
            await asyncio.sleep(2 + 6)
            began = time.perf_counter()
            ids = tuple(self.engine.tokenize(long_text(length + 400))[:length])
            async for event in self.engine.submit(Task("flood", ids, 1)):
                if isinstance(event, Token):  # its progress comes before
                    break
            ended = time.perf_counter()
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            quiet, flood = gaps(marks, began - 6, began), gaps(marks, began, ended)
            return {"quiet": quiet, "flood": flood, "prompt_s": ended - began}

        return asyncio.run(run())


def gaps(streams: list[Marks], begin: float, end: float) -> float:
    found = [b - a for marks in streams for a, b in itertools.pairwise(marks) if begin <= a and b <= end]
    return statistics.quantiles(found, n=20)[-1] * 1e3


class Threaded:
    """A peer whose requests block: one thread for each."""

    def first_and_rest(self, text: str, tokens: int, schema: dict[str, Any] | None = None) -> Marks:
        raise NotImplementedError

    def structured(self, n: int, tokens: int) -> dict[str, float]:
        return self.batch(n, tokens, SCHEMA)

    def batch(self, n: int, tokens: int, schema: dict[str, Any] | None = None) -> dict[str, float]:
        results: list[Marks] = []

        def one(text: str) -> None:
            results.append(self.first_and_rest(text, tokens, schema))

        threads = [threading.Thread(target=one, args=(prompt(),)) for _ in range(n)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return rates(began, results)

    def warm(self) -> dict[str, float]:
        text = long_text(540)

        def first(tail: str) -> float:
            began = time.perf_counter()
            return (self.first_and_rest(text + tail, 1)[0] - began) * 1e3

        return {"cold": first("one"), "warm": statistics.median(first(tail) for tail in ("two", "three", "four"))}


class Xllamacpp(Threaded):
    def __init__(self, path: str, threads: int) -> None:
        import xllamacpp  # noqa: PLC0415 - only there in its own environment

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_parallel, params.n_ctx = SLOTS, SLOTS * N_CTX
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers, params.verbosity = 0, -1
        self.server = xllamacpp.Server(params)

    def first_and_rest(self, text: str, tokens: int, schema: dict[str, Any] | None = None) -> Marks:
        marks: Marks = []

        def chunk(piece: str) -> bool:
            if '"finish_reason":null' in piece:
                marks.append(time.perf_counter())
            return False

        body = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True, "cache_prompt": True}
        body |= {} if schema is None else {"json_schema": schema}
        self.server.handle_completions(json.dumps(body), chunk)
        return marks


class Server(Threaded):
    """llama-cpp-python's own server."""

    def __init__(self, path: str, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {"model": path, "n_ctx": N_CTX, "n_threads": threads, "n_threads_batch": threads, "port": self.port}
        options |= {"interrupt_requests": "false", "verbose": "false", "n_gpu_layers": 0}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.process = subprocess.Popen([sys.executable, "-m", "llama_cpp.server", *arguments], stdout=2)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.2)

    def first_and_rest(self, text: str, tokens: int, schema: dict[str, Any] | None = None) -> Marks:  # noqa: ARG002
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        marks = [time.perf_counter() for line in connection.getresponse() if b'"finish_reason": null' in line]
        connection.close()
        return marks


class Limit:
    """Raw `llama_decode` over the same history: what no scheduler can exceed."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp as low  # noqa: PLC0415 - xllamacpp's environment has none

        self.low = low
        low.llama_log_set(_quiet(low), None)
        low.llama_backend_init()
        params = low.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = low.llama_model_load_from_file(path.encode(), params)
        shape = low.llama_context_default_params()
        shape.n_ctx, shape.n_seq_max, shape.n_batch, shape.n_ubatch = SLOTS * N_CTX, SLOTS, 512, 512
        shape.n_threads = shape.n_threads_batch = threads
        shape.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        shape.n_outputs_max = SLOTS
        self.context = low.llama_init_from_model(self.model, shape)
        self.batch_struct = low.llama_batch_init(512, 0, 1)

    def decode(self, tokens: list[tuple[int, int, bool]]) -> None:
        """(sequence, position, whether its logits are wanted)."""
        batch = self.batch_struct
        for i, (sequence, position, output) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = 1000 + position, position, 1, output
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(tokens)
        assert self.low.llama_decode(self.context, batch) == 0

    def batch(self, n: int, tokens: int) -> dict[str, float]:
        self.low.llama_memory_clear(self.low.llama_get_memory(self.context), False)
        history = 45
        for sequence in range(n):
            self.decode([(sequence, position, position == history - 1) for position in range(history)])
        began = time.perf_counter()
        for step in range(tokens):
            self.decode([(sequence, history + step, True) for sequence in range(n)])
        rate = n * tokens / (time.perf_counter() - began)
        return {"rate": rate, "decode": rate, "ttft": 0.0}


def _quiet(low: Any) -> Any:
    global _callback  # noqa: PLW0603 - llama.cpp calls it as long as the process lives
    _callback = low.llama_log_callback(lambda *_: None)
    return _callback


_callback: Any = None


def main() -> None:
    kind, path, threads = sys.argv[1:4]
    out = sys.stdout
    sys.stdout = sys.stderr
    runner = {"ours": Ours, "xllamacpp": Xllamacpp, "server": Server, "limit": Limit}[kind](path, int(threads))
    print("{}", file=out, flush=True)
    try:
        for line in sys.stdin:
            task = json.loads(line)
            print(json.dumps(getattr(runner, task.pop("do"))(**task)), file=out, flush=True)
    finally:
        if isinstance(runner, Server):
            runner.process.terminate()
        traceback.print_exc()
        os._exit(0)  # engines' threads are not waited for


if __name__ == "__main__":
    main()
