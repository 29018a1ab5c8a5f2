"""`lacre model compare`, `quantize` and `prune`: figures of models' weights, measured on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import AsJson, say, say_json, say_table
from lacre.errors import UsageError
from lacre_backend.commands.model import ModelPath, OutPath, answer, commands, drawn

if TYPE_CHECKING:
    from lacre_backend.workshop.fidelity import Fidelity
    from lacre_backend.workshop.speed import Speed

__all__ = ["commands"]

TextPath = Annotated[Path | None, typer.Option("--text", help="A text to measure on. Default: one that ships, in English.")]


@commands.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A GGUF file: the reference.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="A GGUF file of the same vocabulary.")],
    text: TextPath = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far B's answers are from A's on a text, and how fast both are on this machine."""
    from lacre_backend.workshop.comparison import COMPARE, CompareAsked

    found = answer(COMPARE, CompareAsked(first, second, text), as_json)
    if not as_json:
        both = (("A", found.first), ("B", found.second))
        _say_figures(_row(f"{name} {each.type}", each.bytes, each.fidelity, each.speed) for name, each in both)
        say(f"B is {found.gain:.2f} times as fast as A. {found.second.fidelity.tokens} tokens of the text were scored.")


@commands.command("quantize")
def quantize(
    file: ModelPath,
    out: OutPath,
    type_name: Annotated[
        str | None, typer.Option("--type", help="A type of weights, such as Q8_0. COPY: no change, one file.")
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Try several types; keep the fastest within --max-kl.")] = False,
    max_kl: Annotated[float | None, typer.Option(help="For --auto: the KL divergence allowed. Default: 0.02.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="A text like those served: makes an importance matrix of it.")] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Accept a model that is quantized already.")] = False,
    text: TextPath = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model, and measure its loss and its speed on this machine. Writes OUT if it works."""
    from lacre_backend.workshop import quantization

    if auto == (type_name is not None):
        raise UsageError("Give either --type or --auto.")
    if max_kl is not None and not auto:
        raise UsageError("--max-kl is for --auto: --type writes that type, and prints its loss.")
    bound = (quantization.MAX_KL if max_kl is None else max_kl) if auto else None
    more = () if calibrate is None else quantization.WITH_MATRIX
    types = (*quantization.AUTOMATIC, *more) if type_name is None else (type_name,)
    with drawn() as report:
        asked = quantization.QuantizeAsked(file, out, types, bound, requantize, calibrate, text)
        found = quantization.quantize(asked, report)
    if as_json:
        _say_members(quantization.Quantized, found)
        return
    trials = [each.figures for each in found.tried]
    _say_figures(_row(each.type, each.bytes, each.fidelity, each.speed) for each in (found.source, *trials))
    for trial in found.tried:
        fallen = f", {trial.fell_back} tensors fell back to another type" if trial.fell_back else ""
        say(f"{trial.figures.type}: {trial.gain:.2f} times as fast as the source, written in {trial.seconds:.1f} s{fallen}")
    _say_unchecked(file, found.checked)
    if found.type not in {trial.figures.type for trial in found.tried}:
        say(f"No type is faster here than the source within a KL of {found.max_kl}, so its weights were copied.")
    say(f"Wrote {found.type} to {found.out} ({found.digest}).")


@commands.command("prune")
def prune(
    file: ModelPath,
    drop: Annotated[int, typer.Option(help="How many layers to leave out: those with the least influence.")] = 0,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to leave out, from 0; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. If omitted, it is only measured.")] = None,
    text: TextPath = None,
    as_json: AsJson = False,
) -> None:
    """Leave layers out of a model, and measure what that costs and gains on this machine."""
    from lacre_backend.workshop import pruning

    if bool(drop) == bool(layer):
        raise UsageError("Give either --drop with a number of layers, or --layer for each layer.")
    with drawn() as report:
        found = pruning.prune(pruning.PruneAsked(file, file, drop, tuple(layer or ()), text), out, report)
    if as_json:
        _say_members(pruning.Pruned, found)
        return
    say("influence by layer: " + "  ".join(f"{number}:{value:.3f}" for number, value in enumerate(found.influence)))
    say("dropped: " + ", ".join(map(str, found.dropped)))
    both = (("before", found.before), ("after", found.after))
    _say_figures(_row(name, each.bytes, each.fidelity, each.speed) for name, each in both)
    say(found.advice)
    _say_unchecked(file, found.checked)
    if found.out is not None:
        say(f"Wrote {found.out} ({found.digest}).")


def _say_unchecked(file: Path, checked: bool) -> None:
    if not checked:
        say(f"{file} has no checksum of its own, because `lacre model` did not write it. Whether it is whole was not checked.")


def _say_members(kind: type[object], value: object) -> None:
    from pydantic import TypeAdapter

    say_json(TypeAdapter(kind).dump_python(value, mode="json"), indent=2)


def _say_figures(rows: Iterable[Sequence[str]]) -> None:
    from lacre_backend.engine.tune import SLOTS

    say_table(("", "MB", "KL", "same top", "perplexity", *(f"tok/s at {n}" for n in SLOTS), "prompt tok/s"), rows)


def _row(name: str, size: int, fidelity: Fidelity, speed: Speed) -> Sequence[str]:
    loss = (f"{fidelity.kl:.4f}", f"{fidelity.same_top:.1%}", f"{fidelity.perplexity:.2f}")
    return (name, f"{size / 1e6:.1f}", *loss, *(f"{rate:.0f}" for rate in speed.streams.values()), f"{speed.prompt:.0f}")
