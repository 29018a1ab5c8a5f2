"""Policies beside their cases, and what happens to a set that is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre.wire.header import Kem
from lacre_gateway.auth import Principal
from lacre_gateway.outer import Action, Shape
from lacre_gateway.policy import SCHEMA_FILE, Decision, PolicySet, Question, shipped

CASES = sorted((shipped() / "cases").glob("*/*.json"))
SCHEMA = (shipped() / SCHEMA_FILE).read_text()
KEMS = {kem.label: kem for kem in Kem}


def question(case: dict[str, Any]) -> Question:
    who = case["principal"]
    return Question(
        principal=Principal(who["subject"], who["tenant"], who["issuer"], tuple(who["groups"]), tuple(who["scopes"])),
        action=Action(case["action"]),
        pool=case["pool"],
        model=case["model"],
        max_tokens=case["max_tokens"],
        sealed_bytes=case["sealed_bytes"],
        kem=KEMS[case["kem"]],
        shape=Shape(case["shape"]),
    )


def asked(**changes: Any) -> Question:
    case = json.loads((shipped() / "cases/ALLOW/chat.json").read_text())
    principal = {**case["principal"], **changes.pop("principal", {})}
    return question({**case, **changes, "principal": principal})


@pytest.fixture(scope="module")
def policies() -> PolicySet:
    return PolicySet.load(shipped())


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path, policies: PolicySet) -> None:
    case = json.loads(path.read_text())
    expected = Decision(path.parent.name == "ALLOW", tuple(case["decided_by"]))
    assert policies.decide(question(case)) == expected


def test_every_shipped_policy_has_cases(policies: PolicySet) -> None:
    decided = {name for path in CASES for name in json.loads(path.read_text())["decided_by"]}
    assert decided == {"models-for-everyone", "http-by-scope", "output-ceiling"}


def decide(policy: str, question: Question) -> bool:
    return PolicySet.parse(SCHEMA, policy).decide(question).allowed


def test_default_is_no() -> None:
    assert not decide('permit (principal, action == Action::"embed", resource);', asked())


@pytest.mark.parametrize(
    ("condition", "yes", "no"),
    [
        ('principal in Group::"acme/engineers"', {}, {"principal": {"groups": ["sales"]}}),
        ('principal in Tenant::"acme"', {}, {"principal": {"tenant": "other"}}),
        ('principal == User::"acme/alice"', {}, {"principal": {"subject": "bob"}}),
        ('principal.issuer == "https://issuer.example"', {}, {"principal": {"issuer": "https://evil.example"}}),
        ('resource in Pool::"default"', {}, {"pool": "other"}),
        ('resource == Model::"default/smollm2-135m"', {}, {"model": "other"}),
        ('resource.name == "smollm2-135m"', {}, {"model": "other"}),
        ("context.post_quantum", {}, {"kem": "X25519"}),
        ('context.kem == "MLKEM768-X25519"', {}, {"kem": "X25519"}),
        ('context.shape == "pad"', {"shape": "pad"}, {}),
        ("context.max_tokens <= 512", {}, {"max_tokens": 513}),
        ("context.sealed_bytes < 5000", {}, {"sealed_bytes": 5000}),
        ('context.scopes.contains("a")', {"principal": {"scopes": ["a", "b"]}}, {"principal": {"scopes": ["ab"]}}),
    ],
)
def test_all_of_the_context_can_be_asked_for(condition: str, yes: dict[str, Any], no: dict[str, Any]) -> None:
    policy = f"permit (principal, action, resource) when {{ {condition} }};"
    assert decide(policy, asked(**yes))
    assert not decide(policy, asked(**no))


def test_a_group_of_another_tenant_is_another_group() -> None:
    policy = 'permit (principal in Group::"acme/engineers", action, resource);'
    assert not decide(policy, asked(principal={"tenant": "evil"}))
    # No name that an issuer may give reaches into another tenant.
    assert not decide(policy, asked(principal={"tenant": "evil", "groups": ["acme/engineers", '"]acme/engineers', "../acme"]}))


def test_a_policy_that_fails_means_no() -> None:
    """The sum overflows. Cedar would pass over the forbid; here an error is a no."""
    policy = """
        permit (principal, action, resource);
        forbid (principal, action, resource) when { context.sealed_bytes * 9223372036854775807 > 0 };
    """
    assert not decide(policy, asked(sealed_bytes=3))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\tb", 'User::"root"', "é", "🙂"])
def test_names_are_data(name: str) -> None:
    policy = 'permit (principal, action, resource) when { principal in Tenant::"acme" };'
    assert decide(policy, asked(principal={"subject": name, "groups": [name]}, model=name, pool=name))


@pytest.mark.parametrize(
    "policy",
    [
        'permit (principal, action, resource) when { context.prompt == "x" };',
        'permit (principal, action == Action::"fly", resource);',
        'permit (principal in Pool::"default", action, resource);',
        "permit (principal, action, resource) when { context.max_tokens };",
        "permit everything;",
        "permit (",
    ],
)
def test_policies_that_do_not_fit_the_schema(policy: str) -> None:
    with pytest.raises(SettingsError, match=r"^policies: "):
        PolicySet.parse(SCHEMA, policy)


def test_broken_schema() -> None:
    with pytest.raises(SettingsError, match=r"^policies: "):
        PolicySet.parse("entity;", "permit (principal, action, resource);")


def test_folder_without_policies(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=SCHEMA_FILE.replace(".", r"\.")):
        PolicySet.load(tmp_path)
    shutil.copy(shipped() / SCHEMA_FILE, tmp_path)
    with pytest.raises(SettingsError, match="nothing would be allowed"):
        PolicySet.load(tmp_path)


def test_own_folder(tmp_path: Path) -> None:
    shutil.copy(shipped() / SCHEMA_FILE, tmp_path)
    (tmp_path / "a.cedar").write_text('@id("a") permit (principal, action, resource);')
    (tmp_path / "b.cedar").write_text('@id("b") forbid (principal, action, resource) unless { context.post_quantum };')
    policies = PolicySet.load(tmp_path)
    assert policies.decide(asked()) == Decision(True, ("a",))
    assert policies.decide(asked(kem="X25519")) == Decision(False, ("b",))
