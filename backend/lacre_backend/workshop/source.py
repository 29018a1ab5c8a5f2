"""The model file that a job of this room reads: checked before llama.cpp sees it, then loaded for measuring."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as L
import numpy as np
from llama_cpp.llama_cpp import _lib as _llama

from lacre.errors import SettingsError
from lacre_backend.engine.gguf_header import Header, Tensor
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.protocol import TaskKind
from lacre_backend.engine.shards import check_file, files_of
from lacre_backend.engine.tensor_bytes import tensor_bytes
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models.gguf import FileDigests
from lacre_backend.models.sealed import is_sealed
from lacre_backend.workshop.inspection import check_extents, check_weights, mixture_of, read_header

WINDOW = 512  # tokens of a text that a model reads at once


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A plain model that generates. headers: of each file, in order. type: llama.cpp's name of its mixture of types."""

    files: tuple[Path, ...]
    headers: tuple[Header, ...]
    facts: ModelMetadata

    @classmethod
    def read(cls, path: Path) -> SourceModel:
        """Raises SettingsError for a file that cannot be measured, or OSError. Reads no weights."""
        files = files_at(path)
        headers = tuple(map(read_header, files))
        for file, header in zip(files, headers, strict=True):
            check_extents(file, header)
        check_weights(path, headers)
        facts = ModelMetadata.read(files[0])
        if facts.kind is TaskKind.EMBED or not facts.generates:
            raise SettingsError(
                f"{path} embeds or encodes text. This command measures generation: give a model that generates."
            )
        return cls(files, headers, facts)

    @property
    def path(self) -> Path:
        """The file that llama.cpp loads."""
        return self.files[0]

    @property
    def type(self) -> str:
        return mixture_of(self.headers[0])

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for header in self.headers for tensor in header.tensors]

    def number(self, name: str) -> int:
        """Of the architecture's metadata, such as `block_count`; 0 if it is absent."""
        return self.headers[0].number(f"{self.facts.architecture}.{name}") or 0

    def check_bytes(self) -> bool:
        """Whether the files have checksums of ours. Raises DamagedModel if one does not match. Reads every byte."""
        return FileDigests.read(self.files).checked

    def check_weights(self) -> None:
        """Raises SettingsError if a weight is infinite or not a number, or a block's scale is. Reads every byte."""
        _llama.ggml_validate_row_data.restype = ctypes.c_bool
        _llama.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        for file, header in zip(self.files, self.headers, strict=True):
            data = np.memmap(file, dtype=np.uint8, mode="r")
            for tensor in header.tensors:
                place = data.ctypes.data + header.data_at + tensor.offset
                if not _llama.ggml_validate_row_data(tensor.kind, place, tensor_bytes(file, tensor)):
                    raise SettingsError(
                        f"{file}: the tensor {tensor.name[:64]!r} has weights that are infinite or not numbers. "
                        "Copy the file again, or convert the model again."
                    )


def files_at(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to. Raises SettingsError if it is absent or sealed, and as `files_of`."""
    check_file(path)
    if is_sealed(path):
        raise SettingsError(f"{path} is sealed. Use the plain model that it was made from, and seal the result.")
    return files_of(path)


@contextmanager
def loaded(path: Path) -> Iterator[Model]:
    """The model, with its weights. It is freed when its last user releases it. Raises SettingsError."""
    with closing(Tokenizer(path)) as tokenizer:
        yield Model(path, name=path.stem, digest="", n_ctx=WINDOW, gpu=Gpu(), tokenizer=tokenizer)


def token_text(model: Model, token: int) -> bytes:
    """As the vocabulary writes it, control tokens too."""
    return bytes(L.llama_vocab_get_text(model.vocab, token))
