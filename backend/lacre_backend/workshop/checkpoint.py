"""What a folder with a model holds, before any converter sees it: weights as safetensors, or the reason why it is refused.

Rules:
- Only names, JSON and the heads of safetensors files are read. A length is checked before its bytes are read.
- A pickle is never opened: reading one runs the code in it. The same holds for the Python files of a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError

MAX_HEAD: Final = 100_000_000  # bytes of a safetensors head: the format's own limit
MAX_JSON: Final = 2**26  # bytes of a configuration or an index; those of the largest models have some 10 MB
_LENGTH: Final = 8  # bytes that give a head's length
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_NAMED: Final = 3  # files that a message names
_INDEX: Final = "model.safetensors.index.json"
_CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
# Each may name Python files of the folder, or of a repository, that transformers would run.
_WITH_CODE: Final = (_CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_UPSTREAM: Final = "Serve it sealed through `upstream`, see docs/upstream.md"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that can be converted. weights: its safetensors files. parameters: of all of them together."""

    folder: Path
    architecture: str
    weights: tuple[Path, ...]
    parameters: int


def read_checkpoint(folder: Path, *, trust_code: bool = False) -> ModelFolder:
    """trust_code: whether Python files of the model may run. Raises SettingsError, or OSError."""
    if not folder.is_dir():
        raise SettingsError(_no_folder(folder))
    _refuse_other_formats(folder)
    weights = _weights(folder)
    architecture = _architecture(folder)
    if not trust_code:
        _refuse_code(folder)
    return ModelFolder(folder, architecture, weights, sum(parameters_in(file) for file in weights))


def _no_folder(path: Path) -> str:
    match path.suffix:
        case _ if not path.exists():
            return f"No such folder: {path}. Check the path."
        case ".gguf":
            return f"{path} is GGUF already. Show what it holds with `lacre model inspect`."
        case ".onnx":
            return _onnx(path)
        case _:
            return f"{path} is a file. Give the folder of the model, with config.json, the tokenizer and *.safetensors."


def _onnx(path: Path) -> str:
    return f"{path} holds an ONNX graph, which has no form in GGUF. {_UPSTREAM}: ONNX Runtime or Triton (KServe V2) runs it."


def _refuse_other_formats(folder: Path) -> None:
    if any(folder.glob("saved_model.pb")) or any(folder.glob("[0-9]*/saved_model.pb")):
        raise SettingsError(
            f"{folder} holds a SavedModel of TensorFlow, which has no form in GGUF. {_UPSTREAM}: TensorFlow Serving or "
            "KServe V1 runs it."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise SettingsError(f"{folder} holds a LoRA adapter, not a whole model. Give the folder of its base model.")
    held = [*folder.glob("*.safetensors")]
    if not held and (any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx"))):
        raise SettingsError(_onnx(folder))


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files that the converter will read. It would take pickles if it found none of these."""
    index = folder / _INDEX
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise SettingsError(f"{index} lists no weights. Download the model again.")
        names = sorted({str(name) for name in named.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise SettingsError(f"{index} names a file outside its folder: {outside[0][:80]!r}. Download the model again.")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise SettingsError(f"{folder} lacks {_some(absent)}, which {_INDEX} names. Download the missing files.")
        return tuple(folder / name for name in names)
    found = tuple(sorted(folder.glob("model*.safetensors")))
    if not found:
        raise SettingsError(_no_weights(folder))
    return found


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights as pickles ({_some(pickles)}). Reading a pickle can run any code, so it is refused. "
            "Download the model as safetensors. If there are none, ask its publisher for them."
        )
    if any(folder.glob("consolidated*.safetensors")):
        return f"{folder} has weights in Mistral's own layout (consolidated*.safetensors). Download model*.safetensors as well."
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF already: nothing to convert."
    return f"{folder} has no weights: neither model*.safetensors nor {_INDEX}. Check the path, or download the model again."


def _architecture(folder: Path) -> str:
    path = folder / _CONFIG
    if not path.is_file():
        raise SettingsError(f"{folder} has no {_CONFIG}. Download it with the weights.")
    names = read_json(path).get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SettingsError(f"{path} names no architecture. Download it again.")
    return names[0]


def _refuse_code(folder: Path) -> None:
    for name in _WITH_CODE:
        path = folder / name
        if path.is_file() and "auto_map" in read_json(path):
            raise SettingsError(
                f"{path} asks for Python code of the model's own (auto_map), which could do anything here. Remove the entry if "
                "the model works without it, or read the code and give --trust-code."
            )


def parameters_in(path: Path) -> int:
    """Of a safetensors file. Raises SettingsError."""
    head = safetensors_head(path)
    count = 0
    for name, tensor in head.items():
        if name != "__metadata__":
            shape = tensor.get("shape") if isinstance(tensor, dict) else None
            if not isinstance(shape, list) or not all(isinstance(length, int) and length >= 0 for length in shape):
                raise SettingsError(f"{path}: the tensor {name[:64]!r} has no shape. Download the file again.")
            elements = 1
            for length in shape:
                elements *= length
            count += elements
    return count


def safetensors_head(path: Path) -> Mapping[str, Any]:
    """The head of a safetensors file, if the file is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(MAX_HEAD, size - _LENGTH):
            raise SettingsError(f"{path} is not whole, or not safetensors. Download it again.")
        head = _parsed(path, file.read(length))
    ends = [tensor["data_offsets"][-1] for tensor in head.values() if isinstance(tensor, dict) and tensor.get("data_offsets")]
    end = _LENGTH + length + max((end for end in ends if isinstance(end, int)), default=0)
    if end > size:
        raise SettingsError(f"{path} is cut off: its weights end at byte {end:,}, and it has {size:,}. Download it again.")
    return head


def read_json(path: Path) -> Mapping[str, Any]:
    """An object. Raises SettingsError."""
    if path.stat().st_size > MAX_JSON:
        raise SettingsError(f"{path} has more than {MAX_JSON:,} bytes, so it is no configuration. Download it again.")
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, text: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} holds no usable JSON. Download it again.")
    return value


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
