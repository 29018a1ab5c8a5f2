"""A set of rules that was written for an older version: its schema lacks what was added since."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from lacre.wire.header import Kem
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.policy.explain import explain
from lacre_gateway.policy.question import LATER_ACTIONS, LATER_MEMBERS, AdminAction, AdminQuestion, Question
from lacre_gateway.policy.rules import SCHEMA_FILE, RuleSet
from lacre_gateway.settings import shipped

ROOT = Principal("root", "acme", "https://id.example", (), ("lacre:admin",), None)


def older(folder: Path, *more: str) -> Path:
    """The rules that ship, with a schema that lacks what was added since the first version, and `more`."""
    shutil.copytree(shipped(), folder)
    text = (folder / SCHEMA_FILE).read_text()
    for member in (*LATER_MEMBERS, *more):
        text, found = re.subn(rf"^  {member}\??:.*\n", "", text, flags=re.MULTILINE)
        assert found
    for action in LATER_ACTIONS:
        assert f', "{action}"' in text
        text = text.replace(f', "{action}"', "")
    (folder / SCHEMA_FILE).write_text(text)
    for action in LATER_ACTIONS:
        for case in (folder / "cases").rglob(f"{action.replace(':', '-')}-*"):
            case.unlink()
    return folder


def test_it_decides_as_before(tmp_path: Path) -> None:
    rules = RuleSet.load(older(tmp_path / "older"))
    chat = Question(ROOT, Action.CHAT, "p", "m", 10, 100, Kem.XWING, Shape.NONE, "192.0.2.1", 1.0)
    assert rules.policies.decide(chat).allowed
    assert explain(rules.policies, chat).allowed
    assert rules.policies.decide(AdminQuestion(ROOT, AdminAction.USAGE, "g", "192.0.2.1", 1.0)).allowed


@pytest.mark.parametrize("action", [AdminAction.BUDGET, AdminAction.AUDIT, AdminAction.DRAIN_WORKER])
def test_it_denies_actions_that_it_does_not_know(tmp_path: Path, action: AdminAction) -> None:
    question = AdminQuestion(ROOT, action, "g", "192.0.2.1", 1.0)
    assert RuleSet.load(shipped()).policies.decide(question).allowed
    assert not RuleSet.load(older(tmp_path / "older")).policies.decide(question).allowed


@pytest.mark.parametrize("member", ["hour", "max_tokens"])
def test_it_must_have_what_every_version_had(tmp_path: Path, member: str) -> None:
    with pytest.raises(PolicyError, match="does not fit"):
        RuleSet.load(older(tmp_path / "older", member))
