"""What a folder of PEFT holds, before any converter sees it: a LoRA adapter as safetensors, or the reason why it is refused.

Rules:
- llama.cpp scales an adapter by its alpha and the rank of each pair. What else changes the result is refused by name.
- Only JSON and the head of the safetensors file are read. A pickle is never opened: reading one runs the code in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError
from lacre_backend.workshop.checkpoint import ADAPTER_CONFIG, parameters_in, read_json, safetensors_head

_WEIGHTS: Final = "adapter_model.safetensors"
_PICKLE: Final = "adapter_model.bin"
_HALVES: Final = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")
# Members of the configuration that must be off, and what they are.
_UNSUPPORTED: Final = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole layers of the model (modules_to_save)",
    "trainable_token_indices": "tokens of its own",
    "alpha_pattern": "another alpha for some layers (alpha_pattern)",
    "target_parameters": "changes of single parameters (target_parameters)",
    "layer_replication": "layers that are there several times (layer_replication)",
    "use_bdlora": "a LoRA of blocks (use_bdlora)",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "an activated LoRA, which begins at certain tokens",
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter that can be converted. base: the folder of its base model. rank: of most pairs. targets: the kinds of matrices
    that it changes.
    """

    folder: Path
    weights: Path
    base: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    parameters: int


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path, base: Path | None = None) -> AdapterFolder:
    """base: the folder of its base model; None: the one that training used. Raises SettingsError, or OSError."""
    config = read_json(folder / ADAPTER_CONFIG)
    for what in _unsupported(config):
        raise SettingsError(f"{folder} holds {what}, which llama.cpp cannot apply. Train the adapter without it.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not math.isfinite(alpha):
        raise SettingsError(f"{folder / ADAPTER_CONFIG} gives no rank (r) and no lora_alpha. Download the adapter again.")
    if config.get("use_rslora"):
        raise SettingsError(
            f"{folder} is scaled by the root of its rank (use_rslora), and llama.cpp scales by the rank. Set use_rslora to "
            f"false and lora_alpha to {alpha * math.sqrt(rank):.6g} in {ADAPTER_CONFIG}: this computes the same."
        )
    weights = _weights(folder)
    names = [name for name in safetensors_head(weights) if name != "__metadata__"]
    odd = next((name for name in names if not any(half in name for half in _HALVES)), None)
    if odd is not None or not names:
        raise SettingsError(f"{weights} is no LoRA adapter: {f'its tensor {odd[:80]!r} is none' if odd else 'it is empty'}.")
    targets = tuple(sorted({name.partition(".lora_")[0].rsplit(".", 1)[-1] for name in names}))
    found = base or _base(folder, config.get("base_model_name_or_path"))
    return AdapterFolder(folder, weights, found, rank, float(alpha), targets, parameters_in(weights))


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    if (kind := config.get("peft_type")) != "LORA":
        yield f"an adapter of the kind {str(kind)[:40]}"
    if config.get("bias", "none") != "none":
        yield "trained biases (bias)"
    for name, what in _UNSUPPORTED.items():
        if config.get(name):
            yield what


def _weights(folder: Path) -> Path:
    path = folder / _WEIGHTS
    if path.is_file():
        return path
    if (folder / _PICKLE).exists():
        raise SettingsError(
            f"{folder} has its weights as a pickle ({_PICKLE}). Reading a pickle can run any code, so it is refused. "
            f"Save the adapter as safetensors, or ask its publisher for {_WEIGHTS}."
        )
    raise SettingsError(f"{folder} has no {_WEIGHTS}. Check the path, or download the adapter again.")


def _base(folder: Path, named: object) -> Path:
    """named: a folder, or a name at Hugging Face."""
    if isinstance(named, str) and named and Path(named).is_dir():
        return Path(named)
    model = str(named)[:80] if named else "a model that it does not name"
    raise SettingsError(
        f"{folder} was trained on {model}, and no such folder is here. Give the folder of that model with --base."
    )
