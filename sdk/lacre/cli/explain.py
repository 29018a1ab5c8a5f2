"""`lacre explain`: what an answer rests on. Files, or paragraphs on stdin, are the parts of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from lacre.chat.attribution import Attribution, Lens, LensToken, ScoredToken
from lacre.cli.chat import MaxTokens, Model, System, sampling
from lacre.cli.output import (
    AsJson,
    PinModel,
    PoolName,
    Url,
    at_terminal,
    out,
    pins,
    printable,
    say,
    say_json,
    say_table,
    waiting,
)
from lacre.cli.surroundings import read_file, read_stdin, utf8
from lacre.client import Client
from lacre.errors import SettingsError

BAR: Final = 24  # characters of the longest bar
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_PARAGRAPHS: Final = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
# The mark of a token's rank in a layer: its own for the likeliest, and one for each power of ten.
_RANKS: Final = ((1, "█"), (10, "▓"), (100, "▒"), (1000, "░"))
_FAR: Final = "·"
# Bits from which a token has this style. Below one bit the model held it for likelier than all others together.
_STYLES: Final = ((6.0, "bold red"), (3.0, "yellow"), (1.0, "cyan"))


def explain(
    prompt: Annotated[str, typer.Argument(help="The question about the parts.")],
    files: Annotated[list[Path] | None, typer.Argument(help="A part each; without files, each paragraph on stdin.")] = None,
    answer: Annotated[str | None, typer.Option(help="The answer to explain; by default the model answers first.")] = None,
    url: Url = None,
    pool: PoolName = None,
    pin_model: PinModel = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = 64,
    lens: Annotated[bool, typer.Option("--lens", help="Also show what the model would say after each layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a prompt an answer rests on: `lacre explain "Who was first?" a.txt b.txt`"""
    parts = parts_of(files or ())
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    with Client(url, pool=pool, pin_models=pins(pin_model)) as client:
        with waiting("computing the prompt without each part"):
            told = client.explain(turns, parts=parts, answer=answer, lens=lens, **sampling(model, max_tokens, None))
        checked = client.verification.members()
    if as_json:
        say_json({**told.raw, "attempts": told.attempts, "verification": checked})
        return
    show_answer(told)
    if told.parts:
        say("")
        say_table(("part", "nats", "share", ""), [_row(told, i) for i in range(len(told.parts))])
    if told.lens is not None:
        show_lens(told.lens)


def parts_of(files: Sequence[Path]) -> dict[str, str]:
    """By the files' names, or by the paragraphs' numbers. Raises SettingsError if there are none."""
    if files:
        return {str(path): utf8(read_file(path), str(path)) for path in files}
    found = [text for text in _PARAGRAPHS.split(read_stdin().strip()) if text]
    if not found:
        raise SettingsError(
            'there are no parts: lacre explain "Who was first?" FILE FILE, or cat FILE | lacre explain "Who was first?"'
        )
    return {str(number): text for number, text in enumerate(found, 1)}


def show_answer(told: Attribution) -> None:
    """The answer. At a terminal each token is coloured by its surprise."""
    if not at_terminal():
        say(told.answer)
        return
    out().print(Text.assemble(*((printable(token.text), style(token)) for token in told.tokens)))
    legend = [(f"from {least:g} bits", named) for least, named in reversed(_STYLES)]
    spaced = [piece for entry in legend for piece in (entry, "  ")]
    out().print(Text.assemble(("surprise: ", "dim"), *spaced))


def style(token: ScoredToken) -> str:
    return next((named for least, named in _STYLES if token.bits >= least), "")


def _row(told: Attribution, place: int) -> tuple[str, str, str, str]:
    part = told.parts[place]
    return part.id, f"{part.drop:.1f}", f"{part.share:.0%}", bar(part.share)


def show_lens(lens: Lens) -> None:
    """A row for each token, with a mark for its rank in each layer."""
    if not lens.tokens:
        return
    say("")
    layers = f"layers {lens.layers[0]} to {lens.layers[-1]}"
    say_table(("token", layers, "from", "before"), [seen(lens, token) for token in lens.tokens])
    say("  ".join([*(f"{mark} rank {rank}" if rank == 1 else f"{mark} to {rank}" for rank, mark in _RANKS), f"{_FAR} beyond"]))


def seen(lens: Lens, token: LensToken) -> tuple[str, str, str, str]:
    """from: the layer from which on the token is the likeliest. before: what is the likeliest in the layer before that, or in
    the last one.
    """
    settled = token.settled
    marks = "".join(next((mark for most, mark in _RANKS if rank <= most), _FAR) for rank in token.ranks)
    before = token.says[len(token.says) - 1 if settled is None else settled - 1] if settled != 0 else ""
    return repr(token.text), marks, "-" if settled is None else str(lens.layers[settled]), repr(before) if before else ""


def bar(share: float) -> str:
    """share: 0 to 1 of `BAR` characters, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
