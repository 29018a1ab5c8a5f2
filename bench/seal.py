"""Sealing and opening against raw AES-256-GCM by `cryptography` over the same bytes, taken in turns in one run.

The peer seals the same 16 KiB chunks into the same output buffers: a fresh one of the sealed length, with gaps for the length
prefixes. The protocol adds two costs. Only one of them grows with the message, so each has its own figures:

- `SIZE_request_ratio`, `SIZE_response_ratio`, `SIZE_open_ratio`: the bytes alone, with the keys ready. The client seals, the
  worker seals, the client opens. 1.0 is the peer's speed. `mib_ratio`, the lower of the two that seal 1 MiB, has the goal of at
  least 0.8.
- `SIZE_xwing_seal_whole_ratio`, `SIZE_xwing_open_whole_ratio`: with the key encapsulation and the key schedule, which each
  request needs once, at any size.
- `xwing_request_ms`: the client seals a request of 1 KiB and the worker opens it, from public key to plaintext. The goal is at
  most 1.0 ms.
- `record_seal_us`, `record_open_us`: one streamed token, a piece of BHTTP content of 200 bytes. The worker seals it; the client
  opens and decodes it. The goal is at most 30 µs each.

Ratios are of best times, with memory kept in the process. Times are medians, with the default allocator. At 1 MiB they are
mostly page faults of fresh memory, which the peer has too. `SIZE_xwing_warm_ms` is seal and open without them.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import command
from lacre.wire.bhttp import ResponseDecoder, ResponseEncoder
from lacre.wire.header import MAX_CHUNK, Aead, Kdf, Kem, Suite
from lacre.wire.ohttp import RequestSealer, ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey, ResponseSealer, open_request

TAG = 16
PREFIX = 4  # bytes of the length before a full chunk
NONCE = bytes(12)
SIZES = {"1k": 2**10, "64k": 2**16, "mib": 2**20}
TOKEN = b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" the"}}]}\n\n'
TOKEN = TOKEN + b":" * (198 - len(TOKEN)) + b"\n\n"
RECORDS = 500
KEYS = {1: PrivateKey.generate(1, Kem.X25519), 2: PrivateKey.generate(2, Kem.XWING)}

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h, and a value that no buffer here reaches.
MALLOC_OPTIONS = (-1, -3)
NEVER = 2**25

# Prepares, untimed, and returns what to time.
Operation = Callable[[], Callable[[], object]]


def in_turns(operations: dict[str, Operation], rounds: int) -> dict[str, list[float]]:
    """Milliseconds that each operation took, round by round; what it returned is freed after the clock was read."""
    times: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds):
        for name, prepare in operations.items():
            operate = prepare()
            began = time.perf_counter()
            result = operate()
            times[name].append((time.perf_counter() - began) * 1e3)
            del operate, result
    return times


def keep_memory() -> None:
    """Freed memory stays with the process. Otherwise chance decides which operation finds its pages and which one maps
    them again. The ratio of two operations would be that of their page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in MALLOC_OPTIONS:
            mallopt(option, NEVER)


# The peer


def starts(size: int) -> Iterator[tuple[int, int, int]]:
    """Where each chunk's plaintext begins and ends, and where its sealed form begins."""
    for number, start in enumerate(range(0, size, MAX_CHUNK)):
        yield start, min(start + MAX_CHUNK, size), start + number * (PREFIX + TAG) + PREFIX


def raw_seal(aead: AESGCM, plaintext: bytes) -> bytes:
    chunks = -(-len(plaintext) // MAX_CHUNK)
    buffer = BytesIO(bytes(len(plaintext) + chunks * (PREFIX + TAG)))
    source = memoryview(plaintext)
    with buffer.getbuffer() as out:
        for start, end, at in starts(len(plaintext)):
            aead.encrypt_into(NONCE, source[start:end], b"", out[at : at + end - start + TAG])
    return buffer.getvalue()


def raw_open(aead: AESGCM, sealed: bytes, size: int) -> bytes:
    """Into one buffer, as a worker opens a request."""
    buffer = BytesIO(bytes(size))
    source = memoryview(sealed)
    with buffer.getbuffer() as out:
        for start, end, at in starts(size):
            aead.decrypt_into(NONCE, source[at : at + end - start + TAG], b"", out[start:end])
    return buffer.getvalue()


def raw_open_pieces(aead: AESGCM, sealed: bytes, size: int) -> list[bytes]:
    """Chunk by chunk, as a client opens an answer."""
    source = memoryview(sealed)
    return [aead.decrypt(NONCE, source[at : at + end - start + TAG], b"") for start, end, at in starts(size)]


# Ours


def exchange(kem: Kem) -> tuple[ResponseSealer, ResponseOpener]:
    """Both ends of an answer, its keys derived: the nonce has gone over."""
    config = KEYS[1 if kem is Kem.X25519 else 2].config
    sealed, _, opener = seal_request(config, b"", Suite(kem, Kdf.HKDF_SHA256, Aead.AES_256_GCM))
    sealer = open_request(KEYS, sealed)[2]
    opener.feed(sealer.seal(b""))
    return sealer, opener


def sealed_answer(plaintext: bytes) -> Callable[[], object]:
    sealer, opener = exchange(Kem.X25519)
    sealed = sealer.finish(plaintext)
    return lambda: opener.feed(sealed) + opener.close()


def sealed_request(key: PrivateKey, plaintext: bytes) -> Callable[[], object]:
    body = seal_request(key.config, plaintext)[0]
    return lambda: open_request(KEYS, body)


def requests(label: str, plaintext: bytes, rounds: int) -> command.Figures:
    table: dict[str, Operation] = {}
    for key in KEYS.values():
        name = "xwing" if key.config.kem is Kem.XWING else "x25519"
        table[f"{name}_seal"] = lambda key=key: partial(seal_request, key.config, plaintext)  # type: ignore[misc]
        table[f"{name}_open"] = lambda key=key: sealed_request(key, plaintext)  # type: ignore[misc]
    return {f"{label}_{name}_ms": statistics.median(times) for name, times in in_turns(table, rounds).items()}


def ratios(label: str, plaintext: bytes, rounds: int) -> command.Figures:
    aead, size, xwing = AESGCM(os.urandom(32)), len(plaintext), KEYS[2]
    sealed = raw_seal(aead, plaintext)
    table: dict[str, Operation] = {
        "raw_seal": lambda: partial(raw_seal, aead, plaintext),
        "raw_open": lambda: partial(raw_open, aead, sealed, size),
        "raw_open_pieces": lambda: partial(raw_open_pieces, aead, sealed, size),
        "request": lambda: partial(RequestSealer(xwing.config).finish, plaintext),
        "response": lambda: partial(exchange(Kem.X25519)[0].finish, plaintext),
        "open": lambda: sealed_answer(plaintext),
        "seal_whole": lambda: partial(seal_request, xwing.config, plaintext),
        "open_whole": lambda: sealed_request(xwing, plaintext),
    }
    best = {name: min(times) for name, times in in_turns(table, rounds).items()}
    return {
        f"{label}_request_ratio": best["raw_seal"] / best["request"],
        f"{label}_response_ratio": best["raw_seal"] / best["response"],
        f"{label}_open_ratio": best["raw_open_pieces"] / best["open"],
        f"{label}_xwing_seal_whole_ratio": best["raw_seal"] / best["seal_whole"],
        f"{label}_xwing_open_whole_ratio": best["raw_open"] / best["open_whole"],
        f"{label}_raw_gb_per_s": size / best["raw_seal"] / 1e6,
        f"{label}_xwing_warm_ms": best["seal_whole"] + best["open_whole"],
    }


def records(rounds: int) -> command.Figures:
    """Microseconds for one streamed token on each side; the answer's head is behind it."""
    seal_times, open_times = [], []
    for _ in range(rounds):
        sealer, opener = exchange(Kem.XWING)
        encoder, decoder = ResponseEncoder(), ResponseDecoder()
        decoder.feed(encoder.head(200, (("content-type", "text/event-stream"),)))
        began = time.perf_counter()
        sealed = [sealer.seal(encoder.data(TOKEN)) for _ in range(RECORDS)]
        seal_times.append(time.perf_counter() - began)
        began = time.perf_counter()
        opened = [event for record in sealed for piece in opener.feed(record) for event in decoder.feed(piece)]
        open_times.append(time.perf_counter() - began)
        assert len(opened) == RECORDS
    each = 1e6 / RECORDS
    return {"record_seal_us": statistics.median(seal_times) * each, "record_open_us": statistics.median(open_times) * each}


def measure(quick: bool) -> command.Figures:
    rounds = 300 if quick else 1000
    plaintexts = {label: os.urandom(size) for label, size in SIZES.items()}
    figures: command.Figures = {}
    for label, plaintext in plaintexts.items():
        figures |= requests(label, plaintext, rounds)
    figures |= records(rounds // 5)
    keep_memory()
    for label, plaintext in plaintexts.items():
        figures |= ratios(label, plaintext, rounds)
    figures = {
        "mib_ratio": min(figures["mib_request_ratio"], figures["mib_response_ratio"]),
        "xwing_request_ms": figures["1k_xwing_seal_ms"] + figures["1k_xwing_open_ms"],
        "x25519_request_ms": figures["1k_x25519_seal_ms"] + figures["1k_x25519_open_ms"],
        **{name: figures.pop(name) for name in ("record_seal_us", "record_open_us")},
    } | figures
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    command.run(__doc__, {"seal": measure})
