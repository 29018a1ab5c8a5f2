"""Reads what a run left: the audit logs, the budgets, the clients' proofs; and holds all of it against `checks`."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos import checks
from chaos.load import Ended
from chaos.schedule import GATEWAYS, Kind
from chaos.stage import PLANS, Stage
from chaos.vitals import Life
from lacre.errors import LacreError
from lacre.evidence.audit_proof import AuditProof
from lacre_gateway.audit.check import check_receipt, verify
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.budget.plans import Price, parse
from parts.stage.standing import entries
from parts.up import LACRE


@dataclass(slots=True)
class Result:
    """Of one run. outage: the longest time in which no client got a whole answer. wait: the longest that one waited for an end.

    alone: how often processes ended by themselves and were started again. failed: what strikes could not do.
    """

    seed: int
    seconds: float
    rate: float
    ended: dict[str, int]
    errors: dict[str, int]
    resumed: int
    strikes: Mapping[Kind, int]
    left_out: dict[str, str]
    alone: dict[str, int]
    failed: list[str]
    outage: float
    wait: float
    proofs: int
    lives: dict[str, str]
    violations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        return sum(map(len, self.violations.values()))


def violations(
    stage: Stage, ends: Sequence[Ended], asked: int, proofs: Sequence[str], lives: Sequence[Life], killed: frozenset[str]
) -> dict[str, list[str]]:
    """By check. The gateways were stopped, and message servers still run."""
    folders = {name: stage.audit(name) for name in GATEWAYS}
    read = {name: entries(folder) for name, folder in folders.items()}
    verdicts = {name: _verdict(folder) for name, folder in folders.items()}
    found = {
        "ends": checks.ends(ends, asked),
        "receipts": checks.receipts(read, ends),
        "books": checks.books(read, price(), _budget_lines(stage), killed),
        "logs": checks.logs(verdicts, len(proofs), broken(proofs, folders)),
        "lives": checks.lives(lives),
    }
    return {name: list(wrong) for name, wrong in found.items()}


def price() -> Price:
    found = parse(PLANS, Path("plans.toml")).price_of("any")
    assert found is not None
    return found


def broken(proofs: Sequence[str], folders: Mapping[str, Path]) -> dict[str, str]:
    """What is wrong with each proof that does not hold against the log it names."""
    readers = {name: LogReader(folder) for name, folder in folders.items()}
    wrong = {}
    for header in proofs:
        try:
            proof = AuditProof.parse_header(header)
            name = proof.checkpoint.decode().partition("\n")[0].rpartition("/")[2]
            check_receipt(proof, readers[name])
        except (LacreError, KeyError) as exc:
            wrong[header] = str(exc)
    return wrong


def outage(ends: Sequence[Ended]) -> float:
    """The longest time between two whole answers, of whichever clients."""
    came = sorted(end.at + end.took for end in ends if end.how == "whole")
    return max((later - earlier for earlier, later in pairwise(came)), default=0.0)


def summed(ends: Sequence[Ended]) -> tuple[dict[str, int], dict[str, int]]:
    """How requests ended, and the errors of those that ended in one."""
    how, errors = Counter(end.how for end in ends), Counter(end.error for end in ends if end.error)
    return dict(how), dict(errors.most_common())


def _verdict(folder: Path) -> str | None:
    try:
        wrong = verify(folder).wrong
    except LacreError as exc:
        return str(exc)
    return None if wrong is None else str(wrong)


def _budget_lines(stage: Stage) -> list[dict[str, Any]]:
    audits = [argument for name in GATEWAYS for argument in ("--audit", str(stage.audit(name)))]
    command = [*LACRE, "budget", "show", "--json", "--state", str(stage.site.folder), *audits]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shown.stdout, shown.stderr  # where sums are wrong it ends with 1, and each line says which
    return [json.loads(line) for line in shown.stdout.splitlines()]
