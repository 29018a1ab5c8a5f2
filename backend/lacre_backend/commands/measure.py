"""`lacre model bench`: how fast the worker's engine serves a model here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import AsJson, say, say_table
from lacre_backend.commands.convert import commands
from lacre_backend.commands.model import ModelPath, answer
from lacre_fabric.keys.kms import PLAIN

if TYPE_CHECKING:
    from lacre_backend.workshop.benchmark import StreamRate

__all__ = ["commands"]


@commands.command("bench")
def bench(
    file: ModelPath,
    rounds: Annotated[int, typer.Option(help="How often each figure is taken; the median is printed.")] = 3,
    kms: Annotated[str, typer.Option(help="For a sealed model: the address of the KMS that opens it.")] = PLAIN,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine serves a model: at 1, 4, 8 and 16 streams, and reading a prompt."""
    from lacre_backend.workshop.benchmark import BENCH, BenchAsked

    found = answer(BENCH, BenchAsked(file, kms, rounds), as_json)
    if as_json:
        return
    say_table(("streams", "tok/s", "decode tok/s", "first token ms"), map(_row, found.rates))
    say(f"Reading a prompt of {found.prompt_tokens} tokens: {found.prompt_tokens_per_second:,.0f} tok/s.")
    say(f"{found.name}, {found.bytes / 1e6:,.1f} MB, loaded in {found.load_seconds:.1f} s; medians of {found.rounds} rounds.")


def _row(rate: StreamRate) -> tuple[str, ...]:
    decode = "-" if rate.decode is None else f"{rate.decode:,.0f}"
    return str(rate.streams), f"{rate.tokens_per_second:,.0f}", decode, f"{rate.first_token_ms:,.0f}"
