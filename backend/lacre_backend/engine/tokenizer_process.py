"""The process in which a model's tokenizer runs. `tokenizer` starts it: `python -m …engine.tokenizer_process FILE`.

Why a process: llama.cpp's tokenizers handle a caller's text in three dangerous ways. They use `std::regex`, which recurses once
per character of a match. They use loops that take quadratic time, and assertions that end the process. For nearly every
tokenizer some text triggers one of these. Here it ends only the process that serves that text.

Rules:
- This process loads the vocabulary, tries it, and never tokenizes a caller's text. It forks for each connection, and a fork
  serves one connection. A fork costs two milliseconds, loading a vocabulary up to a second.
- A fork is limited in CPU time, memory and stack. Beyond them the kernel ends it, and its caller sees the connection close.
- A text whose caller has gone is not tokenized to its end.
- Texts never reach the disk: no core dump is written, and nothing is printed after the trial.
- This module imports only the standard library and llama.cpp's bindings, so that it starts in a fifth of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, Final

HEAD: Final = struct.Struct("<QQB")  # bytes that follow, bytes of text among them, and flags
LENGTH: Final = struct.Struct("<Q")  # bytes of an answer
COUNT: Final = struct.Struct("<I")  # bytes of a text, or tokens of one
ADD_SPECIAL: Final = 1  # with the tokens that the tokenizer adds around a text
PARSE_SPECIAL: Final = 2  # the text of a control token becomes that token

STACK: Final = 256 * 2**20  # bytes; std::regex takes up to 321 per character of a match, so 800,000 fit
MEMORY: Final = 64 * 2**20  # bytes that any text may take
MEMORY_PER_BYTE: Final = 160  # further bytes per byte of text; words, symbols and merges take about 100 in the worst case
SECONDS: Final = 0.5  # of CPU time that any text may take
PATIENCE: Final = 5  # further CPU time, in multiples of an ordinary text's time per byte
NICE: Final = 5  # texts yield to the models that decode

_LOADING_SECONDS: Final = 120  # of CPU time; the largest vocabularies take two
_LOADING_MEMORY: Final = 2 * 2**30  # bytes; the largest vocabularies take a tenth
_TRIAL_SECONDS: Final = 10  # of CPU time; a trial takes some hundredths of one
_PR_SET_DUMPABLE: Final = 4
READY: Final = b"ready"
NO_PROCESS: Final = 2**64 - 1  # instead of an answer's length: no process is available for the text now
UNREADABLE: Final = 3  # exit code: llama.cpp cannot load the file, and printed why

# One character for each lead byte and each continuation byte of UTF-8.
_CHARACTERS: Final = "".join((
    *(chr(code) for code in range(0x80, 0x800, 0x3F)),
    *(chr(code) for code in range(0x800, 0xD800, 0xFFF)),
    *(chr(code) for code in (0xE000, 0xFFFD, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000, 0x10FFFF)),
))  # fmt: skip

_ORDINARY: Final = (
    """The quick brown fox jumps over 13 lazy dogs; "every" line ends (somewhere), doesn't it?\n\n"""
    """    def add(a: int, b: int) -> int:\n        return a + b  # Größe, naïve, кит, 北京市, 😀\n""" * 64
).encode()


def main(path: str) -> None:
    _enough_stack()
    _hide()
    control = socket.socket(fileno=0)
    _limit(_LOADING_MEMORY, _LOADING_SECONDS)
    vocab = _load(path)
    _limit(MEMORY, _TRIAL_SECONDS)
    _try(vocab)
    seconds_per_byte = PATIENCE * _pace(vocab)
    signal.setitimer(signal.ITIMER_PROF, 0)
    control.sendall(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that ended leave no zombies
    # They reach the whole group: the worker drains, and this process ends with it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        _byte, descriptors, _flags, _address = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return  # the worker ended, or closed this tokenizer
        connection = socket.socket(fileno=descriptors[0])
        child = _fork()
        if child == -1:
            with contextlib.suppress(OSError):
                connection.send(LENGTH.pack(NO_PROCESS), socket.MSG_DONTWAIT)
        elif child == 0:
            control.close()
            try:
                _serve(connection, vocab, seconds_per_byte)
            finally:
                os._exit(0)
        connection.close()


def _fork() -> int:
    """As `os.fork`; -1 if no process is available now. That connection gets an error, and the next one may succeed."""
    try:
        return os.fork()
    except OSError:
        return -1


def _enough_stack() -> None:
    """The stack limit is fixed when a program starts, so this program restarts itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the same program, by its own path


def _hide() -> None:
    """Disables core dumps, which would contain a text. If memory runs out, this process is killed before the model."""
    with contextlib.suppress(OSError):  # not available in every container
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _limit(memory: int, seconds: float) -> None:
    """memory: bytes in addition to those in use."""
    used = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            used = int(line.split()[1]) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = used + memory
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # when it expires, the process ends


def _load(path: str) -> Any:
    """llama.cpp's vocabulary. Exits the process if there is none."""
    import llama_cpp as L  # noqa: PLC0415 - after `_enough_stack`, which restarts this program

    params = L.llama_model_default_params()
    params.vocab_only = True
    params.n_gpu_layers = 0
    model = L.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        sys.exit(UNREADABLE)
    return L.llama_model_get_vocab(model)


def _try(vocab: Any) -> None:
    """Tries every byte. A vocabulary that fails ends this process here, before it sees a caller's text."""
    for byte in range(256):
        tokens(vocab, bytes([byte]), 0)
    for character in _CHARACTERS:
        tokens(vocab, character.encode(), 0)
    tokens(vocab, b"a", ADD_SPECIAL)


def _pace(vocab: Any) -> float:
    """CPU seconds that an ordinary text takes per byte: 0.1e-6 to 4e-6."""
    began = time.process_time()
    tokens(vocab, _ORDINARY, 0)
    return (time.process_time() - began) / len(_ORDINARY)


def tokens(vocab: Any, data: bytes, flags: int) -> bytes:
    """The ids of a text, each as 32 bits."""
    import llama_cpp as L  # noqa: PLC0415 - already loaded

    size = len(data) + 4  # a token covers at least one byte; some vocabularies add a space and tokens around the text
    for _ in range(2):
        found = (L.llama_token * size)()
        count = L.llama_tokenize(vocab, data, len(data), found, size, bool(flags & ADD_SPECIAL), bool(flags & PARSE_SPECIAL))
        if count >= 0:
            return bytes(memoryview(found).cast("B")[: count * 4])
        size = -count  # a vocabulary that encodes the space as several bytes
    sys.exit(1)


# One connection


def _serve(connection: socket.socket, vocab: Any, seconds_per_byte: float) -> None:
    os.nice(NICE)
    while head := _read(connection, HEAD.size):
        length, size, flags = HEAD.unpack(head)
        texts = _read(connection, length)
        _limit(MEMORY + MEMORY_PER_BYTE * size, SECONDS + seconds_per_byte * size)
        _end_with(connection, True)
        answer = b"".join(_answers(vocab, texts, flags))
        _end_with(connection, False)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(LENGTH.pack(len(answer)) + answer)


def _answers(vocab: Any, texts: bytes, flags: int) -> list[bytes]:
    answers, at = [], 0
    while at < len(texts):
        (size,) = COUNT.unpack_from(texts, at)
        at += COUNT.size
        ids = tokens(vocab, texts[at : at + size], flags)
        answers += [COUNT.pack(len(ids) // 4), ids]
        at += size
    return answers


def _read(connection: socket.socket, size: int) -> bytes:
    """Empty if the caller has gone."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 2**20))
        if not piece:
            os._exit(0)
        data += piece
    return bytes(data)


def _end_with(connection: socket.socket, on: bool) -> None:
    """Whether the kernel ends this process (SIGIO) when its caller closes the connection. Some sandboxes do not support that;
    there it works to its limit.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(connection, fcntl.F_GETFL)
        fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    if on:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if poll.poll(0):  # it was closed before
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
