"""Questions to rules, and rule sets in folders of their own: as they ship, and broken in every way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lacre_gateway.policy.cases import CASE, written
from lacre_gateway.policy.cedar import SYNTAX
from lacre_gateway.policy.question import AnyQuestion
from lacre_gateway.policy.rules import MISSING, PLANS, SCHEMA_FILE, UNREADABLE, RuleSet
from lacre_gateway.settings import shipped

SCHEMA = (shipped() / SCHEMA_FILE).read_text()
RULES = RuleSet.read(shipped())
CHAT = json.loads((shipped() / "cases/ALLOW/chat.json").read_text())
USAGE = json.loads((shipped() / "cases/ALLOW/admin-usage-with-scope.json").read_text())
FAMILY = 'principal, action in Action::"sealed", resource'
ADMINISTRATION = 'principal, action in Action::"admin", resource'


def asked(base: dict[str, Any] = CHAT, **changes: Any) -> AnyQuestion:
    principal = {**base["principal"], **changes.pop("principal", {})}
    return written("case", {**base, **changes, "principal": principal}).question()


def copied(folder: Path) -> Path:
    return shutil.copytree(shipped(), folder / "policies")


# Each a way to break it, and what is said then: the fault, and the file.
def _removed(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def _put(path: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(content.encode() if isinstance(content, str) else content) and None


def _case(**members: Any) -> Callable[[Path], None]:
    return _put("cases/DENY/x.json", json.dumps({**CHAT, "decided_by": None, **members}))


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no schema": (_removed(SCHEMA_FILE), MISSING, SCHEMA_FILE),
    "no rules": (_removed("default.cedar"), MISSING, "*.cedar"),
    "a link to nowhere": (lambda folder: (folder / "x.cedar").symlink_to("nowhere"), MISSING, "x.cedar"),
    "a folder for a file": (lambda folder: (folder / "x.cedar").mkdir(), UNREADABLE, "x.cedar"),
    "not UTF-8": (_put("x.cedar", b"\xff"), UNREADABLE, "x.cedar"),
    "endless": (_put("x.cedar", b" " * (1 << 20) + b" "), UNREADABLE, "x.cedar"),
    "plans that are no TOML": (_put("plans.toml", "["), PLANS, "plans.toml"),
    "a limit of another name": (_put("plans.toml", "[plans.standard.user]\nrequests_per_hour = 1\n"), PLANS, "plans.toml"),
    "syntax": (_put("x.cedar", "permit ("), SYNTAX, "x.cedar"),
    "schema violation": (
        _put("x.cedar", '@id("x") permit (principal, action == Action::"fly", resource);'),
        "schema",
        "x.cedar",
    ),
    "cases left behind": (lambda folder: shutil.rmtree(folder / "cases"), CASE, "cases"),
    "a case that fails": (_case(), CASE, "cases/DENY/x.json"),
    "a case by another rule": (_case(action="http", decided_by=["x"]), CASE, "cases/DENY/x.json"),
    "a case that is no JSON": (_put("cases/ALLOW/x.json", "{"), CASE, "cases/ALLOW/x.json"),
    "a case that lacks something": (_put("cases/ALLOW/x.json", "{}"), CASE, ""),
    "a case with a word too many": (_case(colour="red"), CASE, ""),
}
