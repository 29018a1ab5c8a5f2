"""How far one model's answers are from another's, on a text: KL divergence, same top token, perplexity.

Rules:
- Both read the same windows of `WINDOW` tokens. A window's first `PREFACE` tokens are not scored: too little precedes them.
- The first model's probabilities are kept in memory, `_MOST_KEPT` bytes of them. A longer text is cut off there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.context import Logits
from lacre_backend.engine.model import Model
from lacre_backend.workshop.source import token_text
from lacre_backend.workshop.windows import window_reader, windows_of

PREFACE: Final = 32  # tokens; fewer would mix the model's loss with the text's beginning
LEAST: Final = 2 * PREFACE  # tokens of a text, and of its last window
_MOST: Final = 8192  # tokens of a text: figures become no more exact, and two cores take a minute
_MOST_KEPT: Final = 512 * 2**20  # bytes: 2,700 tokens with a vocabulary of 49,000
_ROWS: Final = 32  # processed at once, in double precision
_MOST_TEXT: Final = 2**20  # bytes of it; `_MOST` tokens are fewer
_SAMPLE: Final = "sample.txt"


class OtherVocabulary(SettingsError):
    """Two models have different tokens, so their probabilities cannot be compared."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """- tokens: scored. perplexity: of the text, for this model.
    - kl: mean divergence from the reference's next-token probabilities, in nats. kl_99: its 99th percentile.
    - same_top: share of tokens at which both think the same token likeliest.
    """  # fmt: skip

    tokens: int
    perplexity: float
    kl: float = 0.0
    kl_99: float = 0.0
    same_top: float = 1.0


@dataclass(frozen=True, slots=True)
class Reference:
    """What the others are compared with. logs: natural logarithms of its probabilities, by window. names: its tokens."""

    path: Path
    windows: list[list[int]]
    logs: list[Logits]
    names: list[bytes]
    fidelity: Fidelity


def read_text(path: Path | None) -> str:
    """The file, or the text that ships with this package. Raises SettingsError, or OSError."""
    if path is None:
        return files(__package__).joinpath(_SAMPLE).read_text(encoding="utf-8")
    if not path.is_file():
        raise SettingsError(f"No such text: {path}. Check the path.")
    try:
        with path.open("rb") as file:
            return file.read(_MOST_TEXT).decode("utf-8", "strict" if path.stat().st_size <= _MOST_TEXT else "ignore")
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text. Convert it, or give another text.") from None


def reference(path: Path, model: Model, text: str) -> Reference:
    """Raises SettingsError if the text is too short, or the model computes values that are not numbers."""
    windows = _kept(windows_of(model, text, most=_MOST, least=LEAST), model.n_vocab)
    logs = list(_logs(path, model, windows))
    surprise = np.concatenate([_surprise(window, each) for window, each in zip(windows, logs, strict=True)])
    fidelity = Fidelity(len(surprise), float(np.exp(surprise.mean())))
    return Reference(path, windows, logs, token_names(model), fidelity)


def fidelity_to(source: Reference, path: Path, model: Model) -> Fidelity:
    """Raises OtherVocabulary, or SettingsError as `reference`."""
    check_vocabulary(source.path, source.names, path, token_names(model))
    surprises, divergences, same = [], [], 0
    for window, expected, logs in zip(source.windows, source.logs, _logs(path, model, source.windows), strict=True):
        surprises.append(_surprise(window, logs))
        divergences.append(divergence(expected, logs))
        same += int((expected.argmax(-1) == logs.argmax(-1)).sum())
    surprise, apart = np.concatenate(surprises), np.concatenate(divergences)
    return Fidelity(
        tokens=len(surprise),
        perplexity=float(np.exp(surprise.mean())),
        kl=float(apart.mean()),
        kl_99=float(np.quantile(apart, 0.99)),
        same_top=same / len(surprise),
    )


def _kept(windows: list[list[int]], n_vocab: int) -> list[list[int]]:
    """The first windows, as many as fit into memory. At least the beginning of one is kept."""
    rows = max(_MOST_KEPT // (4 * n_vocab), PREFACE)
    kept: list[list[int]] = []
    for window in windows:
        take = min(len(window), rows + PREFACE + 1)
        if take < LEAST:
            break
        kept.append(window[:take])
        rows -= take - PREFACE - 1
    return kept


def _logs(path: Path, model: Model, windows: list[list[int]]) -> Iterator[Logits]:
    """For each window, the logarithms of the probabilities of the tokens after its preface: (tokens, vocabulary)."""
    with window_reader(model) as reader:
        for window in windows:
            logits = reader.logits(window, PREFACE)[:-1]  # nothing follows the last token
            if not np.isfinite(logits).all():
                raise SettingsError(
                    f"{path} computes values that are infinite or not numbers. "
                    "Its weights are damaged: copy it again, or convert the model again."
                )
            found = np.empty_like(logits)
            for at in range(0, len(logits), _ROWS):
                found[at : at + _ROWS] = log_softmax(logits[at : at + _ROWS])
            yield found


def log_softmax(logits: Logits) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Natural logarithms of the probabilities, by row, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _surprise(window: list[int], logs: Logits) -> Logits:
    """Of the tokens that did follow."""
    return np.asarray(-logs[np.arange(len(logs)), window[PREFACE + 1 :]])


def divergence(expected: Logits, logs: Logits) -> Logits:
    """By row of two models' logarithms, in nats. Rounding makes equal rows differ a little, below zero too."""
    found = np.empty(len(logs), np.float32)
    for at in range(0, len(logs), _ROWS):
        p, q = expected[at : at + _ROWS].astype(np.float64), logs[at : at + _ROWS]
        found[at : at + _ROWS] = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return found


def token_names(model: Model) -> list[bytes]:
    return [token_text(model, token) for token in range(model.n_vocab)]


def check_vocabulary(source: Path, expected: Sequence[bytes], path: Path, names: Sequence[bytes]) -> None:
    """expected: the tokens of `source`. names: those of `path`. Raises OtherVocabulary if they differ."""
    remedy = "Compare models that were made from the same one."
    if len(names) != len(expected):
        raise OtherVocabulary(f"{source} has {len(expected):,} tokens, and {path} has {len(names):,}. {remedy}")
    for token, (ours, theirs) in enumerate(zip(expected, names, strict=True)):
        if ours != theirs:
            raise OtherVocabulary(
                f"Token {token} is {ours.decode('utf-8', 'replace')[:40]!r} in {source}, and "
                f"{theirs.decode('utf-8', 'replace')[:40]!r} in {path}. {remedy}"
            )
