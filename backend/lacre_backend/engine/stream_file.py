"""A C stream (`FILE *`) whose bytes come from Python, so that llama.cpp loads a model that no file holds in the clear.

glibc's and musl's `fopencookie` make one. Where it is missing, the bytes go into an anonymous file in memory (memfd_create(2)).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from lacre.errors import SettingsError

_BUFFER: Final = 2**16  # bytes of the stream's own buffer; larger reads go past it
_PIECE: Final = 2**20  # bytes copied at a time into a file in memory
_SEEK_BASES: Final = (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)


class Readable(Protocol):
    """Bytes at any place. size: of all."""

    size: int

    def read_into(self, at: int, target: memoryview) -> None:
        """Fills `target`, or raises."""


class StreamFile:
    """pointer: the `FILE *`. error: what reading raised, of which C saw only that it failed."""

    def __init__(self, pointer: int) -> None:
        self.pointer = ctypes.c_void_p(pointer)
        self.error: BaseException | None = None


_Read = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Seek = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
_Close = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Functions(ctypes.Structure):
    """`cookie_io_functions_t`."""

    _fields_ = (("read", _Read), ("write", ctypes.c_void_p), ("seek", _Seek), ("close", _Close))


@contextmanager
def stream_file(source: Readable) -> Iterator[StreamFile]:
    """A stream over `source`, open as long as the block runs. Raises SettingsError if this system cannot make one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fclose.argtypes = [ctypes.c_void_p]
    if not hasattr(libc, "fopencookie"):
        with _in_memory(libc, source) as stream:
            yield stream
        return
    reader = _Reader(source)
    functions = _Functions(_Read(reader.read), None, _Seek(reader.seek), _Close(lambda _cookie: 0))
    libc.fopencookie.restype = ctypes.c_void_p
    libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Functions]
    stream = _opened(libc.fopencookie(None, b"rb", functions))
    reader.stream = stream
    buffer = ctypes.create_string_buffer(_BUFFER)
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.setvbuf(stream.pointer, buffer, 0, _BUFFER)
    try:
        yield stream
    finally:
        libc.fclose(stream.pointer)
        ctypes.memset(buffer, 0, _BUFFER)


class _Reader:
    def __init__(self, source: Readable) -> None:
        self._source = source
        self._at = 0
        self.stream: StreamFile | None = None

    def read(self, _cookie: Any, target: int, size: int) -> int:
        try:
            size = min(size, self._source.size - self._at)
            if size > 0:
                self._source.read_into(self._at, memoryview((ctypes.c_char * size).from_address(target)).cast("B"))
                self._at += size
            return max(size, 0)
        except BaseException as exc:  # noqa: BLE001 - none passes through C; the caller raises it
            if self.stream is not None:
                self.stream.error = exc
            return -1

    def seek(self, _cookie: Any, offset: Any, whence: int) -> int:
        if whence not in _SEEK_BASES:
            return -1
        base = (0, self._at, self._source.size)[_SEEK_BASES.index(whence)]
        if base + offset[0] < 0:
            return -1
        self._at = offset[0] = base + offset[0]
        return 0


@contextmanager
def _in_memory(libc: ctypes.CDLL, source: Readable) -> Iterator[StreamFile]:
    if not hasattr(os, "memfd_create"):
        raise SettingsError("This system cannot load a sealed model: it has neither fopencookie nor memfd_create. Use Linux.")
    libc.fdopen.restype = ctypes.c_void_p
    libc.fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
    file = os.memfd_create("model", os.MFD_CLOEXEC)
    piece = bytearray(_PIECE)
    for at in range(0, source.size, _PIECE):
        view = memoryview(piece)[: min(_PIECE, source.size - at)]
        source.read_into(at, view)
        os.write(file, view)
    piece[:] = bytes(_PIECE)
    os.lseek(file, 0, os.SEEK_SET)
    stream = _opened(libc.fdopen(file, b"rb"))
    try:
        yield stream
    finally:
        libc.fclose(stream.pointer)


def _opened(pointer: int | None) -> StreamFile:
    if not pointer:
        raise SettingsError(f"This system cannot open a stream for a sealed model: {os.strerror(ctypes.get_errno())}.")
    return StreamFile(pointer)
