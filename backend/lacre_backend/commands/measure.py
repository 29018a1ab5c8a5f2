"""`lacre model bench`, `choose` and `default`: how fast models are served here, and which of them suits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lacre.cli.output import AsJson, say, say_json, say_table
from lacre.errors import SettingsError
from lacre_backend.commands.convert import commands
from lacre_backend.commands.model import ModelPath, answer, drawn
from lacre_fabric.keys.kms import PLAIN

if TYPE_CHECKING:
    from lacre_backend.workshop.benchmark import StreamRate
    from lacre_backend.workshop.choosing import Candidate
    from lacre_backend.workshop.default_model import DefaultModel, TriedType

__all__ = ["commands"]

_HEADINGS: Final = ("model", "suits", "type", "MB", "memory MB", "slots", "tok/s at 16", "prompt tok/s", "KL", "score")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)


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


@commands.command("choose")
def choose(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with GGUF files.")] = Path(),
    task: Annotated[str, typer.Option(help="chat, embed or rerank.")] = "chat",
    memory: Annotated[str | None, typer.Option(help="What the model may take, such as 4GiB. Default: what is free.")] = None,
    quality: Annotated[float | None, typer.Option(help="The most loss to the reference: KL in nats, such as 0.02.")] = None,
    reference: Annotated[Path | None, typer.Option(help="The model that the loss counts from.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure speed and loss, which takes a minute for each model.")] = True,
    examples: Annotated[Path | None, typer.Option(help="Your task's own examples, a JSON object a line.")] = None,
    min_score: Annotated[float | None, typer.Option(help="The least score on the examples, such as 0.9.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which models of a folder suit a task: what fits, how fast, at which loss, and how well it does your examples."""
    from pydantic import TypeAdapter

    from lacre_backend.workshop.choosing import ChooseAsked, ChosenModel
    from lacre_backend.workshop.choosing import choose as chosen_from
    from lacre_backend.workshop.examples import ModelTask

    if task not in set(ModelTask):
        raise SettingsError(f"--task is {task!r}; give one of: {', '.join(ModelTask)}.")
    room = None if memory is None else size(memory)
    asked = ChooseAsked(folder, ModelTask(task), room, quality, reference, measure, examples, min_score)
    with drawn() as report:
        found = chosen_from(asked, report)
    if as_json:
        say_json(TypeAdapter(ChosenModel).dump_python(found, mode="json"), indent=2)
        return
    say_table(*_with_figures(_HEADINGS, [_candidate(each) for each in found.candidates]))
    for each in found.candidates:
        if each.reason is not None:
            say(each.reason if each.path.name in each.reason else f"{each.path.name}: {each.reason}")
    if score := next((each.score for each in found.candidates if each.score), None):
        say(f"The score is the {score.measure} on {score.examples} examples.")
    say(f"Chosen: {found.chosen}" if found.chosen else "No model of this folder suits.")


@commands.command("default")
def default(
    again: Annotated[bool, typer.Option("--again", help="Measure although that was done here before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which file `lacre up` serves as the default model here, and why. Measures once, and keeps the file in the cache."""
    from pydantic import TypeAdapter

    from lacre_backend.workshop.default_model import DefaultModel, Surroundings, default_model

    with drawn() as report:
        found = default_model(Surroundings(tell=lambda line: typer.echo(line, err=True), report=report), again=again)
    if as_json:
        say_json(TypeAdapter(DefaultModel).dump_python(found, mode="json"), indent=2)
        return
    _say_default(found)


def size(text: str) -> int:
    """Bytes: a number with B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB. Raises SettingsError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"--memory is {text!r}; give a number with a unit, such as 512MiB or 4GB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** (" KMGT".index(found[2].upper()) if found[2] else 0))


def _with_figures(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that no row fills: a terminal has 80 characters."""
    kept = [i for i in range(len(headings)) if any(row[i] != "-" for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _candidate(each: Candidate) -> tuple[str, ...]:
    def number(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    megabytes = [number(None if value is None else value / 1e6) for value in (each.bytes, each.memory)]
    speeds = (number(each.slots), number(each.streams), number(each.prompt))
    quality = (number(each.kl, ".4f"), number(None if each.score is None else each.score.value, ".3f"))
    return (each.path.name, "yes" if each.suits else "no", each.type or "-", *megabytes, *speeds, *quality)


def _say_default(found: DefaultModel) -> None:
    from lacre_backend.engine.tune import SLOTS

    record = found.record
    if record is not None:
        speeds = (*(f"tok/s at {n}" for n in SLOTS), "prompt tok/s")
        say_table(("type", "MB", "KL", "same top", *speeds, "times as fast"), map(_tried, record.tried))
        say(f"One thread, measured at {record.date} with llama-cpp-python {record.llama_cpp.partition(':')[0]}.")
    say(f"{found.path}: {found.told}")


def _tried(each: TriedType) -> tuple[str, ...]:
    rates = (*each.speed.streams.values(), each.speed.prompt)
    loss = (f"{each.kl:.4f}", f"{each.same_top:.1%}")
    return (each.type, f"{each.bytes / 1e6:.1f}", *loss, *(f"{rate:.0f}" for rate in rates), f"{each.gain:.2f}")
