"""`lacre ask`: one answer, for pipes. The text on stdin is part of the question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lacre.cli.chat import Model, MostTokens, System, Temperature, sampling
from lacre.cli.output import AsJson, PinModel, PoolName, Url, pins, say_json, waiting
from lacre.cli.render import PlainOutput, show
from lacre.cli.surroundings import read_file, read_stdin, utf8
from lacre.client import Client
from lacre.errors import SettingsError


def ask(
    prompt: Annotated[str | None, typer.Argument(help="The question or instruction; text piped to stdin is added.")] = None,
    url: Url = None,
    pool: PoolName = None,
    pin_model: PinModel = None,
    model: Model = None,
    system: System = None,
    max_tokens: MostTokens = None,
    temperature: Temperature = None,
    schema: Annotated[Path | None, typer.Option(help="A file with a JSON schema that the answer must fit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask once, and print only the answer: `cat report.txt | lacre ask "Summarise."`"""
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": question(prompt, read_stdin())})
    params = sampling(model, max_tokens, temperature)
    if schema is not None:
        params["response_format"] = response_format(schema)
    with Client(url, pool=pool, pin_models=pins(pin_model)) as client:
        if not as_json:
            show(client.chat_stream(turns, **params), PlainOutput())
            return
        with waiting("waiting for the answer"):
            reply = client.chat(turns, **params)
    usage = {"prompt": reply.usage.prompt, "completion": reply.usage.completion, "cached": reply.usage.cached}
    told = {"id": reply.id, "model": reply.model, "text": reply.text, "finish_reason": reply.finish_reason, "usage": usage}
    checked = client.verification.members()
    say_json({**told, "attempts": reply.attempts, "verification": checked, "receipt": reply.receipt.text()})


def question(prompt: str | None, piped: str) -> str:
    """The instruction, and the text that it is about. Raises SettingsError if both are missing."""
    parts = [part for part in (prompt, piped.strip()) if part]
    if not parts:
        raise SettingsError('nothing was asked: lacre ask "What is the sea?", or cat FILE | lacre ask "Summarise."')
    return "\n\n".join(parts)


def response_format(path: Path) -> dict[str, Any]:
    """OpenAI's, for the schema in this file. Raises SettingsError."""
    try:
        schema = json.loads(utf8(read_file(path), str(path)).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as exc:
        raise SettingsError(f"{path}: not a readable file with a JSON schema") from exc
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
