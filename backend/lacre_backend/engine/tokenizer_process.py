"""The process in which a model's tokenizer runs, as `tokenizer` starts it: `python -m …engine.tokenizer_process FILE`.

Why a process: llama.cpp's tokenizers meet a caller's text with `std::regex`, which recurses once for each character of a match,
with walks that take the square of the text's length, and with assertions that end the process. Some text does that to nearly
every one of them. Here it ends a process that serves that one text.

Rules
- This process loads the vocabulary, tries it, and never tokenizes a caller's text: it forks for each connection that it is
  handed, and a fork serves one connection. A fork costs two milliseconds, loading a vocabulary up to a second.
- A fork is limited in CPU time, memory and stack. Beyond them the kernel ends it, and its caller sees its connection close.
- A text whose caller went away is not tokenized to its end.
- Texts touch no disk: no core dump is written, and nothing is printed once the vocabulary is tried.
- Nothing here is imported but the standard library and llama.cpp's bindings, so that it starts in a fifth of a second.
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

HEAD: Final = struct.Struct("<QQB")  # bytes that follow, of which text, and flags
LENGTH: Final = struct.Struct("<Q")  # bytes of an answer
COUNT: Final = struct.Struct("<I")  # bytes of a text, or tokens of one
ADD_SPECIAL: Final = 1  # with what the tokenizer puts around a text
PARSE_SPECIAL: Final = 2  # literals of control tokens become control tokens

STACK: Final = 256 * 2**20  # bytes. std::regex takes up to 321 for each character of a match: 800,000 fit
MEMORY: Final = 64 * 2**20  # bytes that any text may take,
MEMORY_PER_BYTE: Final = 160  # and further ones for each byte of it: words, symbols and merges are some 100 at the worst
SECONDS: Final = 0.5  # of CPU time that any text may take,
PATIENCE: Final = 5  # times as long as an ordinary text takes for each byte of it
NICE: Final = 5  # texts give way to the models that decode

_LOADING_SECONDS: Final = 120  # of CPU time: the largest vocabularies take two
_LOADING_MEMORY: Final = 2 * 2**30  # bytes: the largest vocabularies take a tenth
_TRIAL_SECONDS: Final = 10  # of CPU time: a trial takes some hundredths of one
_PR_SET_DUMPABLE: Final = 4
READY: Final = b"ready"
NO_PROCESS: Final = 2**64 - 1  # in place of an answer's length: no process can be had for the text now
UNREADABLE: Final = 3  # exit code: llama.cpp does not load the file, and said why

# One character for each byte that begins a longer one in UTF-8, and for each that goes on with one.
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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that ended leave nothing behind
    for number in (signal.SIGINT, signal.SIGTERM):  # for the whole group: the worker drains, and this ends with it
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
    """As `os.fork`; -1 where no process can be had now. That connection is told, and the next one may do better."""
    try:
        return os.fork()
    except OSError:
        return -1


def _enough_stack() -> None:
    """Where a stack may grow to is decided as a program starts, so this one starts anew."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the same program, by its own path


def _hide() -> None:
    """What a crash leaves behind would hold a text. Out of memory, this process goes before the model does."""
    with contextlib.suppress(OSError):  # not every container has it
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _limit(memory: int, seconds: float) -> None:
    """memory: bytes beyond those in use."""
    used = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            used = int(line.split()[1]) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = used + memory
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # at its end the process is ended


def _load(path: str) -> Any:
    """llama.cpp's vocabulary. Ends the process where there is none."""
    import llama_cpp as L  # noqa: PLC0415 - after `_enough_stack`, which starts this program anew

    params = L.llama_model_default_params()
    params.vocab_only = True
    params.n_gpu_layers = 0
    model = L.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        sys.exit(UNREADABLE)
    return L.llama_model_get_vocab(model)


def _try(vocab: Any) -> None:
    """A vocabulary that does not stand every byte ends this process here, before any text of a caller's is there."""
    for byte in range(256):
        tokens(vocab, bytes([byte]), 0)
    for character in _CHARACTERS:
        tokens(vocab, character.encode(), 0)
    tokens(vocab, b"a", ADD_SPECIAL)


def _pace(vocab: Any) -> float:
    """Seconds of CPU time that an ordinary text takes for each byte here: 0.1e-6 to 4e-6."""
    began = time.process_time()
    tokens(vocab, _ORDINARY, 0)
    return (time.process_time() - began) / len(_ORDINARY)


def tokens(vocab: Any, data: bytes, flags: int) -> bytes:
    """The ids of a text, each of 32 bits."""
    import llama_cpp as L  # noqa: PLC0415 - loaded by now

    size = len(data) + 4  # a token covers at least one byte; some vocabularies put a space, and tokens, around the text
    for _ in range(2):
        found = (L.llama_token * size)()
        count = L.llama_tokenize(vocab, data, len(data), found, size, bool(flags & ADD_SPECIAL), bool(flags & PARSE_SPECIAL))
        if count >= 0:
            return bytes(memoryview(found).cast("B")[: count * 4])
        size = -count  # a vocabulary that spells the space by several bytes
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
    """Empty where the caller went away."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 2**20))
        if not piece:
            os._exit(0)
        data += piece
    return bytes(data)


def _end_with(connection: socket.socket, on: bool) -> None:
    """Whether the kernel ends this process (SIGIO) as its caller closes the connection. Some sandboxes cannot do that: then it
    works on to its limit.
    """  # fmt: skip
    with contextlib.suppress(OSError):
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(connection, fcntl.F_GETFL)
        fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    if on:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if poll.poll(0):  # it closed it before
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
