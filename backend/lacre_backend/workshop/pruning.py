"""Leaves layers out of a model, and measures what that costs and gains on this machine: `lacre model prune`.

Rules:
- Every tensor that stays keeps its bytes: a quantized model loses nothing beside its layers.
- The advice is computed from this run's figures alone.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.models.gguf import FileDigests
from lacre_backend.workshop.child import Job, Report, run
from lacre_backend.workshop.comparison import Figures, figures
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.fidelity import fidelity_to, read_text, reference
from lacre_backend.workshop.importance import influence
from lacre_backend.workshop.rewriting import Rewriting, rewrite
from lacre_backend.workshop.source import SourceModel, files_at, loaded
from lacre_backend.workshop.speed import gain, speeds

GAINED: Final = 1.05  # times as fast; less is within the noise of these measurements
CLOSE: Final = 0.02  # nats: the bound of `quantize --auto`


@dataclass(frozen=True, slots=True)
class PruneAsked:
    """drop: how many layers, those with the least influence. layers: these ones, in place of that."""

    path: Path
    out: Path
    drop: int = 0
    layers: tuple[int, ...] = ()
    text: Path | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """out: None: only measured. influence: of each layer. dropped: their numbers. gain: how many times as fast.

    checked: whether the source has a checksum, which matches.
    """

    out: Path | None
    digest: str
    influence: list[float]
    dropped: list[int]
    before: Figures
    after: Figures
    gain: float
    advice: str
    checked: bool


def prune(asked: PruneAsked, out: Path | None, report: Report) -> Pruned:
    """Without `out`, the pruned file is measured and removed. Raises SettingsError, OSError or JobFailed."""
    files = files_at(asked.path)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            told = run(PRUNE, replace(asked, out=Path(folder) / asked.path.name), report)
            return replace(told, out=None, after=replace(told.after, path=asked.path))
    with draft(out, files) as path:
        told = run(PRUNE, replace(asked, out=path), report)
    return replace(told, out=out, after=replace(told.after, path=out))


def _prune(asked: PruneAsked, report: Report) -> Pruned:
    report("reading", 0.0)
    text, source = read_text(asked.text), SourceModel.read(asked.path)
    _check(asked, source)
    checked = source.check_bytes()
    source.check_weights()
    with loaded(source.path) as model:
        found = influence(source, model, text, lambda share: report("the layers' influence", 0.05 + 0.15 * share))
        report("the source on the text", 0.2)
        expected = reference(source.path, model, text)
    least = sorted(range(len(found)), key=lambda layer: found[layer])
    dropped = sorted(asked.layers or least[: asked.drop])
    report("writing", 0.35)
    rewrite(source.path, asked.out, Rewriting(None, without=dropped), lambda _share: None)
    report("the pruned model on the text", 0.4)
    pruned = SourceModel.read(asked.out)
    with loaded(asked.out) as model:
        loss = fidelity_to(expected, asked.out, model)
    before, after = speeds([source.path, asked.out], lambda share: report("speed", 0.6 + 0.4 * share))
    one, two, faster = figures(source, expected.fidelity, before), figures(pruned, loss, after), gain(after, before)
    digest = "sha256:" + FileDigests.read([asked.out]).model
    return Pruned(asked.out, digest, found, dropped, one, two, faster, _advice(two, faster), checked)


PRUNE: Final = Job(f"{__name__}:PRUNE", PruneAsked, Pruned, _prune)


def _check(asked: PruneAsked, source: SourceModel) -> None:
    """Raises SettingsError. llama.cpp aborts without any layer, and ignores unknown ones."""
    layers = source.number("block_count")
    twice = [layer for layer, times in Counter(asked.layers).items() if times > 1]
    unknown = [layer for layer in asked.layers if not 0 <= layer < layers]
    if unknown:
        raise SettingsError(f"{source.path} has no layer {unknown[0]}. Its layers are 0 to {layers - 1}.")
    if twice:
        raise SettingsError(f"Layer {twice[0]} is named twice. Name each layer once.")
    count = len(asked.layers) or asked.drop
    if not 1 <= count < layers:
        raise SettingsError(f"{count} layers cannot be dropped: {source.path} has {layers}. Drop 1 to {layers - 1}.")


def _advice(pruned: Figures, faster: float) -> str:
    """From the loss and the gain of this run."""
    fidelity = pruned.fidelity
    changed, speed = f"{1 - fidelity.same_top:.1%} of the top tokens change", f"it is {faster:.2f} times as fast"
    if faster < GAINED:
        return f"Keep the source: {changed}, and {speed}, which is no gain."
    if fidelity.kl > CLOSE:
        return f"Do not serve it as it is: {changed} (KL {fidelity.kl:.3f}), though {speed}. Train it further, or quantize."
    return f"It can replace the source: {changed} (KL {fidelity.kl:.4f}), and {speed}."
