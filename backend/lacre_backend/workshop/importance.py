"""What matters in a model's weights, measured while it reads a text: by column, for quantizing; by layer, for pruning.

- The importance of a column is the mean square of the activation that it is multiplied with ("importance matrix").
- The influence of a layer is 1 less the mean cosine between its input and its output (block influence of ShortGPT,
  arXiv 2403.03853). A layer with an influence of 0 changes no direction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Final

import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.graph import GraphTensor, Values, Watcher
from lacre_backend.engine.model import Model
from lacre_backend.workshop.fidelity import LEAST
from lacre_backend.workshop.source import SourceModel
from lacre_backend.workshop.windows import window_reader, windows_of

_MOST: Final = 16_384  # tokens of a calibration text; two cores read them in a minute
_MOST_FOR_LAYERS: Final = 2048  # an influence is a mean over tokens, and settles sooner
_EMBEDDED: Final = ("inp_scaled", "inp_embd", "embd")  # what architectures call the first layer's input, the latest first
_OUTPUT: Final = "l_out-"


def importance_matrix(source: SourceModel, model: Model, text: str, report: Callable[[float], None]) -> dict[str, Values]:
    """By tensor: the importance of each column. Raises SettingsError."""
    if source.number("expert_count"):
        raise SettingsError(f"{source.path} is a mixture of experts; --calibrate cannot measure these. Leave it out.")
    sums: dict[str, Values] = {}
    rows: dict[str, int] = defaultdict(int)

    def wanted(tensor: GraphTensor) -> bool:
        weights = tensor.source(0) if tensor.operation == "MUL_MAT" else None
        return weights is not None and weights.name.endswith(".weight")

    def got(tensor: GraphTensor) -> None:
        weights, activation = tensor.source(0), tensor.source(1)
        if weights is not None and activation is not None:
            values = activation.rows()
            rows[weights.name] += len(values)
            sums[weights.name] = sums.get(weights.name, np.float32(0)) + np.square(values).sum(0)

    _read(model, windows_of(model, text, most=_MOST, least=LEAST), Watcher(wanted, got), report)
    if not sums:
        raise SettingsError(f"llama.cpp multiplies {source.path} in a way that --calibrate cannot see. Leave --calibrate out.")
    return {name: values / np.float32(rows[name]) for name, values in sums.items()}


def influence(source: SourceModel, model: Model, text: str, report: Callable[[float], None]) -> list[float]:
    """By layer. Raises SettingsError for an architecture whose layers llama.cpp does not name."""
    seen: dict[str, Values] = {}
    layers = source.number("block_count")
    totals: list[list[float]] = [[] for _ in range(layers)]

    def got(tensor: GraphTensor) -> None:
        values = tensor.rows()
        if not (number := tensor.name.removeprefix(_OUTPUT)).isdecimal():
            seen["input"] = values
            return
        before = seen.get("input")
        if before is not None and before.shape == values.shape and int(number) < layers:
            totals[int(number)].append(1 - _cosine(before, values))
        seen["input"] = values

    watcher = Watcher(lambda tensor: tensor.name in _EMBEDDED or tensor.name.startswith(_OUTPUT), got)
    _read(model, windows_of(model, text, most=_MOST_FOR_LAYERS, least=LEAST), watcher, report)
    if not all(totals):
        raise SettingsError(f"llama.cpp does not name the layers of {source.path}, so their influence cannot be measured.")
    return [float(np.mean(each)) for each in totals]


def _read(model: Model, windows: list[list[int]], watcher: Watcher, report: Callable[[float], None]) -> None:
    with window_reader(model, watcher) as reader:
        for number, window in enumerate(windows):
            report(number / len(windows))
            reader.logits(window)


def _cosine(one: Values, other: Values) -> float:
    """The mean over tokens."""
    dots = (one * other).sum(-1, dtype=np.float64)
    lengths = np.linalg.norm(one, axis=-1).astype(np.float64) * np.linalg.norm(other, axis=-1)
    return float((dots / np.maximum(lengths, 1e-30)).mean())
