"""LoRA adapters: their files are checked and loaded beside a base model. `adapted` serves them.

Rules:
- A file is checked before llama.cpp reads it, because llama.cpp ends the process at some wrong types, and ignores some tensors.
- llama.cpp must have every adapter before it makes a context, and frees them with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import llama_cpp as L

from lacre.errors import SettingsError
from lacre_backend.engine import gguf_header
from lacre_backend.engine.gguf_header import Header, Tensor
from lacre_backend.engine.model import Model, Weights, logged_errors
from lacre_backend.engine.shards import files_of
from lacre_backend.engine.stream_file import stream_file

_HALVES: Final = (".lora_a", ".lora_b")
_EMBEDDING: Final = "token_embd.weight"  # llama.cpp reads its pair the other way round
_TYPES: Final = (0, 1, 8, 30)  # of ggml: F32, F16, Q8_0, BF16, those that llama.cpp's converter writes
_TEXTS: Final = ("general.type", "adapter.type", "general.architecture")
_ALPHA: Final = "adapter.lora.alpha"
_FLOAT32: Final = 6  # GGUF's type of it; llama.cpp ends the process at another
_INVOKED: Final = "adapter.alora.invocation_tokens"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter to load. name: within its base model. digest: `sha256:` and hex, of the file.

    weights: of a sealed one, of which `path` has the head alone. source: the file that the settings name, for messages; None:
    `path`.
    """

    name: str
    path: Path
    digest: str
    weights: Weights | None = None
    source: Path | None = None


class LoadedBeside(Protocol):
    """A file that is loaded beside a model."""

    @property
    def path(self) -> Path: ...


def size(files: Iterable[LoadedBeside]) -> int:
    """Bytes of them all."""
    return sum(file.path.stat().st_size for file in files)


def load(model: Model, base: Path, adapters: Sequence[AdapterFile]) -> dict[str, Any]:
    """llama.cpp's adapters by name. base: the model's file. Raises SettingsError, or what reading sealed weights raises."""
    return {adapter.name: _load(model, base, adapter) for adapter in adapters}


def _load(model: Model, base: Path, adapter: AdapterFile) -> Any:
    check(adapter.path, base, adapter.source)
    with logged_errors() as errors:
        pointer = _pointer(model, adapter)
    if not pointer:
        _refuse(adapter.source or adapter.path, "; ".join(errors) or "llama.cpp gives no reason")
    return pointer


def _pointer(model: Model, adapter: AdapterFile) -> Any:
    if adapter.weights is None:
        return L.llama_adapter_lora_init(model.pointer, str(adapter.path).encode())
    with stream_file(adapter.weights) as stream:
        pointer = L.llama_adapter_lora_init_from_file_ptr(model.pointer, stream.pointer)
    adapter.weights.loaded()
    if stream.error is not None:
        raise stream.error  # llama.cpp frees the adapter with the model
    return pointer


def check(path: Path, base: Path, source: Path | None = None) -> None:
    """Raises SettingsError if the file is no LoRA adapter, or not one for this base model. source: as in `AdapterFile`."""
    header, of_base = _head(path), [_head(file) for file in files_of(base)]
    path = source or path
    kind, of, architecture = (header.text(key) for key in _TEXTS)
    if kind != "adapter" or of != "lora":
        _refuse(path, f"it is not a LoRA adapter (general.type is {kind}, adapter.type is {of})")
    if architecture != (ours := of_base[0].text("general.architecture")):
        _refuse(path, f"it is for the architecture {architecture}, and {base.name} is {ours}")
    if _INVOKED in header.metadata:
        _refuse(path, "it is an activated LoRA, which begins at certain tokens; those are not supported")
    alpha = header.metadata.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or header.kinds.get(_ALPHA, _FLOAT32) != _FLOAT32:
        _refuse(path, f"its {_ALPHA} is no finite 32-bit number")
    _check_tensors(path, header, {tensor.name: tensor for one in of_base for tensor in one.tensors})


def _check_tensors(path: Path, header: Header, of_base: Mapping[str, Tensor]) -> None:
    halves = {tensor.name: tensor for tensor in header.tensors}
    if not halves:
        _refuse(path, "it has no tensors")
    for name, tensor in halves.items():
        target = next((name.removesuffix(half) for half in _HALVES if name.endswith(half)), None)
        if target is None:
            _refuse(path, f"llama.cpp cannot apply its tensor {name}; train without `modules_to_save`")
        if target not in of_base:
            _refuse(path, f"the base model has no tensor {target}")
        if tensor.kind not in _TYPES:
            _refuse(path, f"its tensor {name} has the type {tensor.kind}; F32, F16, BF16 and Q8_0 are supported")
        first, second = (halves.get(target + half) for half in _HALVES)
        if first is None or second is None or not _fit(of_base[target], first, second):
            _refuse(path, f"its pair for {target} does not fit the base model's shape {of_base[target].shape}")


def _fit(base: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether the product of both halves has the base tensor's shape. ggml writes the length of a row first."""
    (inner, rank, *more), (also_rank, outer, *others) = _at_least_two(first), _at_least_two(second)
    wide, high, *rest = _at_least_two(base)
    if base.name == _EMBEDDING:
        return (high, wide) == (rank, outer) and inner == also_rank > 0
    return (wide, high) == (inner, outer) and rank == also_rank > 0 and more == others == rest


def _at_least_two(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape if len(tensor.shape) > 1 else (*tensor.shape, 1)


def _head(path: Path) -> Header:
    try:
        return gguf_header.read(path)
    except gguf_header.Malformed as exc:
        _refuse(path, str(exc))


def _refuse(path: Path, why: str) -> NoReturn:
    raise SettingsError(
        f"The adapter {path} cannot be used: {why}. "
        "Convert it with llama.cpp's convert_lora_to_gguf.py, for the base model that it was trained on."
    )
