"""`lacre policy`: check a rule set, run its cases, explain a decision, and replay an audit log. Nothing here needs a
gateway.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lacre.cli.output import AsJson, say_json, say_table
from lacre.cli.surroundings import read_file, stdin_text, utf8
from lacre.errors import SettingsError
from lacre_gateway.audit.commands import KeyOption, counted, parse_key, seconds

if TYPE_CHECKING:  # a command imports its requirements when it runs
    from lacre_gateway.policy.explain import Explanation, Voice
    from lacre_gateway.policy.replay import Change, Replay
    from lacre_gateway.policy.rules import RuleSet

policy_app = typer.Typer(name="policy", help="The rules: check, test and explain them.", no_args_is_help=True)

Folder = Annotated[Path | None, typer.Argument(help="The folder of the rule set; default: the one that ships with Lacre.")]
_VERDICT = {True: "allow", False: "deny", None: "depends"}


def register(app: typer.Typer) -> None:
    app.add_typer(policy_app)


@policy_app.command("copy")
def policy_copy(folder: Annotated[Path, typer.Argument(help="The new folder.")]) -> None:
    """Copy the rule set that ships with Lacre into a new folder, to edit it there."""
    from lacre_gateway.policy.rules import copy_shipped

    copy_shipped(folder)
    typer.echo(
        f"{folder}: edit it, run `lacre policy check {shlex.quote(str(folder))}`, and name it `policies` in gateway.toml"
    )


@policy_app.command("check")
def policy_check(folder: Folder = None, as_json: AsJson = False) -> None:
    """Check a set as a gateway does before it activates it: everything parses, fits together, and every case holds."""
    rules = _rules(folder, cases_too=True)
    found = {
        "policies": sorted(rules.policies.names.values()), "cases": len(rules.cases), "policy_set": rules.policies.digest,
        "rules": rules.digest,
    }  # fmt: skip
    if as_json:
        say_json(found)
    else:
        typer.echo(f"{len(rules.policies.names)} policies, {len(rules.cases)} cases: a gateway would activate them")
        typer.echo(f"policy set {rules.policies.digest}")


@policy_app.command("test")
def policy_test(folder: Folder = None, as_json: AsJson = False) -> None:
    """Run the cases, and say whether each holds. Exit code 1 if one does not."""
    found = [(case.name, wrong) for case, wrong in _rules(folder).run()]
    failed = [name for name, wrong in found if wrong is not None]
    if as_json:
        say_json({"cases": len(found), "failed": {name: wrong for name, wrong in found if wrong is not None}})
    else:
        for name, wrong in found:
            typer.echo(f"{'ok  ' if wrong is None else 'FAIL'} {name}{'' if wrong is None else f': {wrong}'}")
        typer.echo(f"{len(found) - len(failed)} of {len(found)} cases hold")
    if failed:
        raise typer.Exit(1)


@policy_app.command("explain")
def policy_explain(
    request: Annotated[str, typer.Argument(help="A request as in a case, or an audit entry, as JSON; - for stdin.")],
    policies: Annotated[
        Path | None, typer.Option(help="The folder of the rule set; default: the one that ships with Lacre.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a request is decided, by which policies, and what it still depends on. Members that the request omits count as
    open.
    """
    from lacre_gateway.policy.explain import explain, requested

    try:
        values = json.loads(stdin_text() if request == "-" else utf8(read_file(Path(request)), request))
    except (ValueError, RecursionError) as exc:
        raise SettingsError(f"{request} is not JSON") from exc
    question, missing = requested(values)
    found = explain(_rules(policies).policies, question, missing)
    if as_json:
        say_json(_explanation(found))
    else:
        _tell(found)


@policy_app.command("replay")
def policy_replay(
    audit: Annotated[Path, typer.Argument(help="The folder of an audit log.")],
    against: Annotated[Path, typer.Option(help="The folder of the proposed rule set.")],
    since: Annotated[datetime | None, typer.Option(help="Requests from this time on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Requests before this time, UTC.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of the table, the newest ones.", min=1)] = 100,
    as_json: AsJson = False,
    key: KeyOption = None,
) -> None:
    """Decide the requests of a log and its successors again under other rules, and print the decisions that would change.

    `lacre audit verify` tells whether the log holds.
    """
    from lacre_gateway.audit import feed
    from lacre_gateway.policy.replay import replay

    rules = _rules(against)
    public = parse_key(key)
    entries = counted("deciding again", feed.entries(audit, public), [audit], public)
    found = replay(entries, rules.policies, seconds(since), seconds(until))
    if as_json:
        say_json(_replayed(found, rules.policies.digest))
    else:
        _tell_replay(found, limit)


def _rules(folder: Path | None, *, cases_too: bool = False) -> RuleSet:
    """The set; first read in another process, which a hostile file may end. Raises PolicyError."""
    from lacre_gateway.policy.cases import CASE
    from lacre_gateway.policy.cedar import PolicyError
    from lacre_gateway.policy.rules import RuleSet
    from lacre_gateway.policy.trial import try_out
    from lacre_gateway.settings import shipped

    folder = (folder or shipped()).resolve()
    try:
        asyncio.run(try_out(folder))
    except PolicyError as exc:
        if cases_too or exc.fault != CASE:
            raise
    return RuleSet.read(folder)


def _explanation(found: Explanation) -> dict[str, Any]:
    return {
        "decision": _VERDICT[found.allowed],
        "decided_by": [_voice(voice) for voice in found.deciding] if found.allowed is not None else [],
        "missing": list(found.missing),
        "depends_on": [{**_voice(voice), "needs": list(voice.needs)} for voice in found.voices if voice.holds is None],
        "conditions_do_not_hold": [_voice(voice) for voice in found.near],
    }


def _voice(voice: Voice) -> dict[str, Any]:
    return {
        "id": voice.name, "effect": voice.effect, "annotations": dict(voice.annotations), "failed": voice.failed,
        "policy": voice.text,
    }  # fmt: skip


def _tell(found: Explanation) -> None:
    if found.allowed is None:
        typer.echo(f"depends on {', '.join(f'context.{name}' for name in found.missing)}, which the request does not contain")
    elif found.deciding:
        typer.echo(f"{_VERDICT[found.allowed]}, by")
        _tell_voices(found.deciding)
    else:
        typer.echo("deny: no policy permits it")
    undecided = [voice for voice in found.voices if voice.holds is None]
    if undecided:
        typer.echo("\nopen, because the request does not contain what they need:")
        _tell_voices(undecided)
    if found.near:
        typer.echo("\nfor such requests, but the conditions do not hold:")
        _tell_voices(found.near)


def _tell_voices(voices: Sequence[Voice]) -> None:
    for voice in voices:
        needs = f", needs {', '.join(f'context.{name}' for name in voice.needs)}" if voice.needs else ""
        failed = ", which could not be evaluated" if voice.failed else ""
        typer.echo(f"  {voice.name} ({voice.effect}{needs}){failed}")
        for name, text in voice.annotations.items():
            typer.echo(f"    @{name}: {text}")
        for line in voice.text.splitlines():
            if not line.startswith("@"):
                typer.echo(f"    {line}")


def _replayed(found: Replay, policy_set: str) -> dict[str, Any]:
    return {
        "policy_set": policy_set,
        "decided": found.decided,
        "changes": [_change(change) for change in found.changes],
        "other_policies": [_change(change) for change in found.reasons],
        "unsure": [{"index": index, "why": why} for index, why in found.unsure],
    }


def _change(change: Change) -> dict[str, Any]:
    members, was, becomes = change.asked.members, change.asked.was, change.becomes
    return {
        "index": change.asked.index, "request_id": members["request_id"], "time": members["time"],
        "tenant": members["tenant"], "subject": members["subject"], "action": members["action"],
        "resource": change.asked.resource,
        "was": {"decision": _VERDICT[was.allowed], "policies": was.policies, "policy_set": was.policy_set},
        "becomes": {"decision": _VERDICT[becomes.allowed], "policies": becomes.policies},
    }  # fmt: skip


def _tell_replay(found: Replay, limit: int) -> None:
    rows = []
    for change in found.changes[-limit:]:
        members = change.asked.members
        row = (str(change.asked.index), f"{members['tenant']}/{members['subject']}", members["action"], change.asked.resource)
        rows.append((*row, *(_words(decision.allowed, decision.policies) for decision in (change.asked.was, change.becomes))))
    if rows:
        say_table(("entry", "tenant/subject", "action", "resource", "was", "becomes"), rows)
    if (hidden := len(found.changes) - limit) > 0:
        typer.echo(f"and {hidden} earlier ones: --limit shows more, --json all")
    denied = sum(not change.becomes.allowed for change in found.changes)
    typer.echo(
        f"{found.decided} requests decided again: {len(found.changes)} would change, {denied} to deny and "
        f"{len(found.changes) - denied} to allow; {len(found.reasons)} keep their decision by other policies"
    )
    for index, why in found.unsure[:10]:
        typer.echo(f"entry {index} cannot be decided again: {why}")
    if len(found.unsure) > 10:
        typer.echo(f"and {len(found.unsure) - 10} more")


def _words(allowed: bool, policies: Sequence[str]) -> str:
    return f"{_VERDICT[allowed]} ({', '.join(policies) or 'no policy'})"
