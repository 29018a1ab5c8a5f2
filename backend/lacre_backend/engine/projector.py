"""A projector: what turns a picture into states of a language model, by llama.cpp's `mtmd`.

Rules:
- A file is checked by its head before mtmd reads it, because mtmd ends the process at some wrong values.
- mtmd gets pixels, never a caller's file: its own decoders are of another kind than the rest of what reads callers' bytes.
- Pictures are decoded and cut to size in a few threads, before the request is admitted: so their tokens count into the prompt.
  Only the decode thread computes what they mean.
- Its log is dropped, except for errors while a projector loads: it tells the sizes of callers' pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

import llama_cpp as L

from lacre.errors import SettingsError
from lacre_backend.engine import gguf_header, pictures
from lacre_backend.engine.adapted import adapted_digest
from lacre_backend.engine.context import FLASH, Compute
from lacre_backend.engine.gguf_header import Header
from lacre_backend.engine.model import Model, Weights, logged_errors
from lacre_backend.engine.protocol import EngineClosed, ImageRefused, ReadImage
from lacre_backend.engine.shards import files_of
from lacre_backend.engine.tensor_bytes import tensor_bytes

AT_ONCE: Final = 2  # pictures decoded at a time: each takes some 300 MiB at most
INSTALL: Final = "`make projector` installs both; docs/projectors.md says how by hand"
_PIECE: Final = 2**20  # bytes of a sealed file copied at a time
_MARKER: Final = b"<__media__>"
_TRIED: Final = 512  # pixels a side of a picture that is tried when a projector is loaded
_TEXT: Final = 0  # mtmd's kind of a chunk of tokens; the others are media
_BOOL: Final = 7  # GGUF's type
_LIMITS: Final = {  # of numbers that mtmd divides by, or takes memory for
    "clip.vision.image_size": 2**14,
    "clip.vision.patch_size": 2**10,
    "clip.vision.embedding_length": 2**16,
    "clip.vision.block_count": 2**10,
    "clip.vision.attention.head_count": 2**10,
}


@dataclass(frozen=True, slots=True)
class ProjectorFile:
    """A projector to load. digest: `sha256:` and hex, of the file. source: the file that the settings name, for messages.

    weights: of a sealed one, of which `path` has the head alone.
    """

    path: Path
    digest: str
    source: Path
    weights: Weights | None = None


def projected_digest(model: str, projector: str | None) -> str:
    """The digest of a model with a projector: as with an adapter. None: it has none, and the digest is the model's own."""
    return model if projector is None else adapted_digest(model, projector)


def check(file: ProjectorFile, base: Path) -> None:
    """Raises SettingsError if the file is no projector of images for this model, by both heads. base: the model's file."""
    header, of_base = _head(file.path, file.source), _head(files_of(base)[0], base)
    kind = header.text("general.architecture")
    if kind != "clip":
        _refuse(file.source, f"it is not a projector (general.architecture is {kind}, not clip)")
    if not _flag(header, "clip.has_vision_encoder"):
        heard = "it encodes audio alone, and" if _flag(header, "clip.has_audio_encoder") else "it has no vision encoder, and"
        _refuse(file.source, f"{heard} only projectors of images are supported")
    for key, most in _LIMITS.items():
        if not 0 < (value := header.number(key) or 0) <= most:
            _refuse(file.source, f"its {key} is {value}, not 1 to {most}")
    architecture = of_base.text("general.architecture") or ""
    ours, theirs = of_base.number(f"{architecture}.embedding_length"), header.number("clip.vision.projection_dim")
    if ours != theirs:
        _refuse(file.source, f"it makes states of {theirs} numbers, and those of {base.name} have {ours}")
    size = file.path.stat().st_size
    ends = [header.data_at + each.offset + tensor_bytes(file.source, each) for each in header.tensors]
    if not ends or size < max(ends):
        _refuse(file.source, "it is cut off, or has no tensors")


def _flag(header: Header, key: str) -> bool:
    return header.metadata.get(key) is True and header.kinds.get(key) == _BOOL


def _head(path: Path, source: Path) -> Header:
    try:
        return gguf_header.read(path)
    except (gguf_header.Malformed, OSError) as exc:
        _refuse(source, str(exc))


def _refuse(path: Path, why: str) -> NoReturn:
    raise SettingsError(
        f"The projector {path} cannot be used: {why}. "
        "Give the file that llama.cpp's converter writes for this model with --mmproj."
    )


def mtmd() -> ModuleType:
    """llama.cpp's library for images. Raises SettingsError if this build has none."""
    try:
        module = importlib.import_module("llama_cpp.mtmd_cpp")
    except (ImportError, OSError, RuntimeError):
        raise SettingsError(
            f"`projector` needs a llama-cpp-python that was built with mtmd, and this one was not: {INSTALL}."
        ) from None
    if not pictures.available():
        raise SettingsError(f"`projector` needs the package Pillow, which decodes images: {INSTALL}.")
    return module


class Projector:
    """A loaded projector, and an `ImageReader`. `pointer` is mtmd's, for the decode thread."""

    def __init__(self, model: Model, base: Path, file: ProjectorFile, compute: Compute, *, gpu: bool) -> None:
        """base: the model's file. gpu: whether it may use one. Raises SettingsError, or what reading sealed weights raises."""
        check(file, base)
        self.mtmd: Any = mtmd()
        self.model = model  # mtmd uses its vocabulary
        self.compute = compute
        params = self.mtmd.mtmd_context_params_default()
        params.use_gpu = gpu
        params.print_timings = params.warmup = False
        params.n_threads = compute.threads
        params.flash_attn_type = FLASH[compute.flash]
        params.media_marker = _MARKER
        with logged_errors() as errors, _readable(file) as path, _logging(self.mtmd, errors):
            self.pointer: Any = self.mtmd.mtmd_init_from_file(str(path).encode(), model.pointer, params)
        if not self.pointer:
            _refuse(file.source, "; ".join(errors) or "mtmd gives no reason")
        # As the model: not at exit, while a thread may still use it.
        weakref.finalize(self, self.mtmd.mtmd_free, self.pointer).atexit = False
        self._try(file.source)
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="images")

    async def read(self, data: bytes) -> ReadImage:
        try:
            reading = self._pool.submit(self._read, data)
        except RuntimeError:  # the pool's error once it was shut down
            raise EngineClosed("The engine is closed.") from None
        return await asyncio.wrap_future(reading)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _try(self, source: Path) -> None:
        try:
            self._shown(pictures.Pixels(_TRIED, _TRIED, bytes(3 * _TRIED * _TRIED)))
        except ImageRefused as refusal:
            _refuse(source, str(refusal))

    def _read(self, data: bytes) -> Chunks:
        return self._shown(pictures.decoded(data))

    def _shown(self, pixels: pictures.Pixels) -> Chunks:
        bitmap = self.mtmd.mtmd_bitmap_init(
            pixels.width, pixels.height, (ctypes.c_uint8 * len(pixels.rgb)).from_buffer_copy(pixels.rgb)
        )
        try:
            return Chunks(self, bitmap)
        finally:
            self.mtmd.mtmd_bitmap_free(bitmap)


class Chunks:
    """A picture, cut to what the encoder takes, with the projector's own tokens around it: a `ReadImage`."""

    def __init__(self, projector: Projector, bitmap: Any) -> None:
        """Raises ImageRefused if the projector cannot take it."""
        m = projector.mtmd
        self._projector = projector
        self._chunks = m.mtmd_input_chunks_init()
        weakref.finalize(self, m.mtmd_input_chunks_free, self._chunks).atexit = False
        text = m.mtmd_input_text()
        text.text, text.text_len = _MARKER, len(_MARKER)
        text.add_special, text.parse_special = False, True
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        if m.mtmd_tokenize(projector.pointer, self._chunks, ctypes.byref(text), bitmaps, 1) != 0:
            raise ImageRefused("the model's projector cannot take a picture of its size")
        self.tokens = sum(int(m.mtmd_input_chunk_get_n_tokens(chunk)) for chunk in self)
        if self.tokens < 1 or not all(0 <= token < projector.model.n_vocab for token in self._marks()):
            # mtmd ends the process at a mark that the vocabulary lacks
            raise ImageRefused("the model's vocabulary lacks what its projector writes around a picture")

    def __iter__(self) -> Iterator[Any]:
        """Mtmd's chunks in order."""
        m = self._projector.mtmd
        for i in range(m.mtmd_input_chunks_size(self._chunks)):
            yield m.mtmd_input_chunks_get(self._chunks, i)

    def _marks(self) -> Iterator[int]:
        """The tokens around and between the parts of the picture."""
        m = self._projector.mtmd
        for chunk in self:
            if m.mtmd_input_chunk_get_type(chunk) == _TEXT:
                n = ctypes.c_size_t(0)
                tokens = m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                yield from (int(tokens[i]) for i in range(n.value))

    @property
    def whole(self) -> int:
        """Tokens that must be computed together, because each sees the later ones."""
        m, pointer = self._projector.mtmd, self._projector.pointer
        together = [
            int(m.mtmd_input_chunk_get_n_tokens(chunk))
            for chunk in self
            if m.mtmd_input_chunk_get_type(chunk) != _TEXT and m.mtmd_decode_use_non_causal(pointer, chunk)
        ]
        return max(together, default=0)

    @property
    def belongs_to(self) -> Projector:
        return self._projector


@contextlib.contextmanager
def _readable(file: ProjectorFile) -> Iterator[Path]:
    """Where mtmd reads the file: it takes a path alone, so a sealed one is opened into memory, and closed after loading."""
    if file.weights is None:
        yield file.path
        return
    held = os.memfd_create("projector", os.MFD_CLOEXEC)
    try:
        for at in range(0, file.weights.size, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, file.weights.size - at)))
            file.weights.read_into(at, piece)
            while piece:
                piece = piece[os.write(held, piece) :]
        file.weights.loaded()
        yield Path(f"/proc/self/fd/{held}")
    finally:
        os.close(held)


@contextlib.contextmanager
def _logging(module: Any, errors: Any) -> Iterator[None]:
    """The library's own log: its errors are kept while the block loads a projector, and nothing afterwards."""

    @L.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, _user_data: object) -> None:
        if level == _ERROR and (said := text.decode("utf-8", "replace").strip(" .\n")):
            errors.append(said)

    module.mtmd_helper_log_set(keep, ctypes.c_void_p(0))
    try:
        yield
    finally:
        module.mtmd_helper_log_set(_drop, ctypes.c_void_p(0))


_ERROR: Final = 4  # ggml's level


@L.llama_log_callback  # type: ignore[untyped-decorator]
def _drop(_level: int, _text: bytes, _user_data: object) -> None:
    """Drops mtmd's log outside of loading."""
