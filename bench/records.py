"""How many records a second the Python SDK, the npm package in Node and the npm package in Chromium open, in turns.

    PYTHONPATH=tests .venv/bin/python -m bench.records

All open one sealed answer, whose records are streamed tokens of 200 bytes, and decode the Binary HTTP in it. They get
each record apart, as from a network. Without `node` or `chromium`, that side does not run.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bench import command
from bench.seal import TOKEN
from lacre.wire.bhttp import Data, ResponseDecoder, ResponseEncoder
from lacre.wire.header import Aead, Kdf, Kem, SealedHeader, Suite
from lacre.wire.ohttp import ResponseOpener
from lacre.wire.opening import ResponseSealer
from parts.npm import install

RECORDS: Final = 4000
ROOT: Final = Path(__file__).resolve().parent.parent
HEADER: Final = SealedHeader(1, Suite(Kem.X25519, Kdf.HKDF_SHA256, Aead.AES_256_GCM), bytes(range(32)))
SECRET: Final = bytes(range(32))

Opens = Callable[[], float]  # the answer once; records a second


def answer() -> list[bytes]:
    """Its nonce, its head, its tokens, its end."""
    sealer, encoder = ResponseSealer(HEADER, SECRET, bytes(32)), ResponseEncoder()
    head = sealer.seal(encoder.head(200, [("content-type", "text/event-stream")]))
    tokens = [sealer.seal(encoder.data(TOKEN)) for _ in range(RECORDS)]
    return [head, *tokens, sealer.seal(encoder.end()), sealer.finish()]


def by_python(pieces: list[bytes]) -> float:
    opener, decoder, contents = ResponseOpener(HEADER, SECRET), ResponseDecoder(), 0
    began = time.perf_counter()
    for piece in pieces:
        for record in opener.feed(piece):
            contents += sum(isinstance(event, Data) for event in decoder.feed(record))
    for record in opener.close():
        decoder.feed(record)
    decoder.close()
    taken = time.perf_counter() - began
    assert contents == RECORDS
    return RECORDS / taken


@contextmanager
def by_program(name: str, file: Path) -> Iterator[Opens]:
    """A program of bench/javascript, which stays until the end."""
    environment = os.environ | {"CHROMIUM": shutil.which("chromium") or ""}
    command_line = ["node", str(ROOT / "bench" / "javascript" / name), str(file)]
    with subprocess.Popen(
        command_line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        assert program.stdout.readline() == "ready\n"

        def opens() -> float:
            print(file=program.stdin, flush=True)
            told = json.loads(program.stdout.readline())  # type: ignore[union-attr]
            assert told["contents"] == RECORDS
            return float(told["rate"])

        yield opens
        program.stdin.close()


def measure(quick: bool) -> command.Figures:
    pieces = answer()
    text = {"enc": HEADER.enc, "secret": SECRET}
    told = {name: base64.b64encode(data).decode() for name, data in text.items()}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answer.json"
        held = [base64.b64encode(piece).decode() for piece in pieces]
        file.write_text(json.dumps(told | {"aead": int(Aead.AES_256_GCM), "pieces": held}))
        sides: dict[str, Opens] = {"python": lambda: by_python(pieces)}
        if shutil.which("npm") is not None:
            install(ROOT / "sdk" / "javascript")
            sides["node"] = stack.enter_context(by_program("node.mjs", file))
            if shutil.which("chromium") is not None:
                install(ROOT / "tests" / "heavy" / "browser")
                sides["chromium"] = stack.enter_context(by_program("page.mjs", file))
        return _in_turns(sides, 5 if quick else 21)


def _in_turns(sides: dict[str, Opens], rounds: int) -> command.Figures:
    """Medians, and of each round's ratio to the Python SDK. The first round warms all of them up."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rate = sides[name]()
            if turn > 0:
                rates[name].append(rate)
    figures = {f"{name}_records_per_s": float(round(statistics.median(each))) for name, each in rates.items()}
    ratios = {name: [one / two for one, two in zip(each, rates["python"], strict=True)] for name, each in rates.items()}
    return figures | {
        f"{name}_of_python": round(statistics.median(each), 3) for name, each in ratios.items() if name != "python"
    }


if __name__ == "__main__":
    command.run(__doc__, {"records": measure})
