"""`lacre status`: every check of this client's connection, one by one."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from lacre.chat.reply import Reply
from lacre.cli import lock
from lacre.cli.chat import Model
from lacre.cli.output import AsJson, PinModel, PoolName, Url, error_members, exit_code, pins, say_json, tell, waiting
from lacre.client import Client
from lacre.errors import LacreError

QUESTION = "Say yes."


def status(
    url: Url = None,
    pool: PoolName = None,
    pin_model: PinModel = None,
    model: Model = None,
    ask: Annotated[bool, typer.Option(help="Also seal a question of one token, to check receipt and audit.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check everything that a request depends on, and print the verified facts."""
    models: tuple[str, ...] = ()
    reply: Reply | None = None
    error: LacreError | None = None
    with Client(url, pool=pool, pin_models=pins(pin_model)) as client:
        began = time.monotonic()
        try:
            with waiting("fetching the manifest"):
                models = client.models()
            if ask:
                with waiting("asking a sealed question of one token"):
                    reply = client.with_options(model=model).chat(QUESTION, max_tokens=1)
        except LacreError as exc:
            error = exc
        seconds = time.monotonic() - began
        checked = client.verification
    if as_json:
        failed = None if error is None else error_members(error)
        say_json({**checked.members(), "models": models, "ok": error is None, "error": failed}, indent=2)
    else:
        lock.show(checked, *_more(models, reply, seconds))
        if error is not None:
            tell(error)
    if error is not None:
        raise typer.Exit(exit_code(error))


def _more(models: tuple[str, ...], reply: Reply | None, seconds: float) -> list[lock.Row]:
    rows: list[lock.Row] = [(bool(models), "models", ", ".join(models) or "unknown")]
    if reply is not None:
        rows.append((True, "answered", f"by {reply.model} in {seconds:.2f} s, attempts: {reply.attempts}"))
    return rows
