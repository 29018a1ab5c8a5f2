"""`lacre chat`: a question with its answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lacre.cli.output import PinModel, PoolName, Url, at_terminal, out, pins
from lacre.cli.render import PlainOutput, Rendered, show
from lacre.cli.surroundings import stdin_lines
from lacre.client import Client

Model = Annotated[str | None, typer.Option(help="The model; the pool's first by default.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
MaxTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
MostTokens = Annotated[int | None, typer.Option("--max-tokens", help="The longest answer, in tokens; default: the model's.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature.")]

Turn = dict[str, str]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; without one, a conversation.")] = None,
    url: Url = None,
    pool: PoolName = None,
    pin_model: PinModel = None,
    model: Model = None,
    system: System = None,
    max_tokens: MostTokens = None,
    temperature: Temperature = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print answers as they are, without rendering Markdown.")] = False,
    history: Annotated[Path | None, typer.Option(help="Keep the input history in this file; default: in memory.")] = None,
) -> None:
    """Talk to a model, sealed. The token comes from LACRE_TOKEN."""
    params = sampling(model, max_tokens, temperature)
    turns = [{"role": "system", "content": system}] if system is not None else []
    with Client(url, pool=pool, pin_models=pins(pin_model)) as client:
        if prompt is not None:
            display = Rendered(out()) if at_terminal() and not plain else PlainOutput()
            show(client.chat_stream([*turns, {"role": "user", "content": prompt}], **params), display)
        elif sys.stdin.isatty() and at_terminal():
            from lacre.cli.conversation import Conversation

            Conversation(client, turns, params, rendered=not plain, history=history).run()
        else:
            _from_a_pipe(client, turns, params)


def sampling(model: str | None, max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """The parameters that the caller set."""
    params = {"max_tokens": max_tokens, "model": model, "temperature": temperature}
    return {name: value for name, value in params.items() if value is not None}


def _from_a_pipe(client: Client, turns: list[Turn], params: dict[str, Any]) -> None:
    """Each line is a turn, and each answer a paragraph; the first error ends it."""
    for question in _lines():
        turns.append({"role": "user", "content": question})
        stream = client.chat_stream(turns, **params)
        show(stream, PlainOutput())
        turns.append({"role": "assistant", "content": stream.text})


def _lines() -> Iterator[str]:
    yield from filter(None, map(str.strip, stdin_lines()))
