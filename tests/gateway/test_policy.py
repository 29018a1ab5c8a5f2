"""Rules beside their cases: what they may speak of, and what happens to a set that is broken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_gateway.http.headers import Action
from lacre_gateway.policy.cases import PolicyCase
from lacre_gateway.policy.cedar import MAX_DECISIONS, NAMES, SYNTAX, Decision, PolicyError, PolicySet
from lacre_gateway.policy.question import AdminAction, AnyQuestion, Question
from lacre_gateway.policy.rules import MISSING, NO_CASES, SCHEMA_FILE, RuleSet
from lacre_gateway.settings import shipped
from parts.policies import BROKEN, CHAT, FAMILY, RULES, SCHEMA, USAGE, asked, copied


@pytest.mark.parametrize("case", RULES.cases, ids=lambda case: case.name)
def test_case(case: PolicyCase) -> None:
    assert case.fails(RULES.policies.decide(case.request.question())) is None


def test_a_case_that_does_not_hold_says_so() -> None:
    """Each case, its verdict or its deciding policy turned round."""
    for case in RULES.cases:
        decision = RULES.policies.decide(case.request.question())
        assert "must be" in (case.fails(Decision(not decision.allowed, decision.policies)) or "")
        assert "must be decided by" in (case.fails(Decision(decision.allowed, ("other",))) or "")


def test_every_shipped_policy_and_action_has_cases() -> None:
    decided = {name for case in RULES.cases for name in case.request.decided_by or ()}
    assert decided == set(RULES.policies.names.values())
    actions = {case.request.question().action for case in RULES.cases if case.allowed}
    assert actions == {*Action, *AdminAction}


def decide(policy: str, *questions: AnyQuestion) -> list[bool]:
    policies = PolicySet.parse(SCHEMA, {"x.cedar": f'@id("x") {policy}'})
    return [policies.decide(question).allowed for question in questions]


OF_CALLERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ('principal in Group::"acme/engineers"', {}, {"principal": {"groups": ["sales"]}}),
    ('principal in Tenant::"acme"', {}, {"principal": {"tenant": "other"}}),
    ('principal == User::"acme/alice"', {}, {"principal": {"subject": "bob"}}),
    ('principal.issuer == "https://issuer.example"', {}, {"principal": {"issuer": "https://evil.example"}}),
    ('principal.name == "alice"', {}, {"principal": {"subject": "bob"}}),
    ('resource in Pool::"default"', {}, {"pool": "other"}),
    ('resource == Model::"default/smollm2-135m"', {}, {"model": "other"}),
    ('resource.name == "smollm2-135m"', {}, {"model": "other"}),
    ('action == Action::"chat"', {}, {"action": "complete"}),
    ("context.post_quantum", {}, {"kem": "X25519"}),
    ('context.kem == "MLKEM768-X25519"', {}, {"kem": "X25519"}),
    ('context.shape == "pad"', {"shape": "pad"}, {}),
    ("context.max_tokens <= 512", {}, {"max_tokens": 513}),
    ("context.sealed_bytes < 5000", {}, {"sealed_bytes": 5000}),
    ('context.scopes.contains("a")', {"principal": {"scopes": ["a", "b"]}}, {"principal": {"scopes": ["ab"]}}),
    ('context has plan && context.plan == "gold"', {"principal": {"plan": "gold"}}, {}),
    ("context.hour >= 8 && context.hour < 18", {"hour": 8}, {"hour": 18}),
    ('context.zone == "UTC" && context.weekday <= 5', {"time": "2026-11-27T12:00:00Z"}, {"time": "2026-11-28T12:00:00Z"}),
    ("context.local_hour < 8", {"time": "2026-11-27T07:59:59Z"}, {"time": "2026-11-27T08:00:00Z"}),
    ('context.address.isInRange(ip("192.0.2.0/24"))', {}, {"address": "198.51.100.1"}),
    ('context.address.isInRange(ip("192.0.2.0/24"))', {"address": "::ffff:192.0.2.9"}, {"address": "::1"}),
    ('context.address.isInRange(ip("fe80::/10"))', {"address": "fe80::1%eth0"}, {"address": "nonsense"}),
]
OF_ADMINISTRATORS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ('resource == Gateway::"g1"', {}, {"gateway": "g2"}),
    ('action == Action::"admin:usage"', {}, {"action": "admin:drain"}),
    ('principal in Group::"acme/engineers"', {}, {"principal": {"groups": []}}),
    ('context.scopes.contains("lacre:admin")', {}, {"principal": {"scopes": []}}),
    ("context.address.isLoopback()", {"address": "127.0.0.1"}, {}),
    ("context.hour == 3", {"hour": 3}, {}),
    ("context.weekday == 7 && context.local_minute == 5", {"time": "2026-11-29T00:05:00Z"}, {"time": "2026-11-29T00:06:00Z"}),
    ('context has plan && context.plan == "gold"', {"principal": {"plan": "gold"}}, {}),
]
ADMIN = 'principal, action in Action::"admin", resource'


@pytest.mark.parametrize(
    ("family", "base", "row"),
    [*((FAMILY, CHAT, row) for row in OF_CALLERS), *((ADMIN, USAGE, row) for row in OF_ADMINISTRATORS)],
)
def test_all_of_the_context_can_be_asked_for(family: str, base: dict[str, Any], row: tuple[str, Any, Any]) -> None:
    """In one set, so that a decision which is remembered under too little shows. Neither family gets what the other may."""
    condition, yes, no = row
    other = asked(CHAT if base is USAGE else USAGE)
    questions = [asked(base, **yes), asked(base, **no)] * 2
    assert decide(f"permit ({family}) when {{ {condition} }};", *questions, other) == [True, False, True, False, False]


def test_a_group_of_another_tenant_is_another_group() -> None:
    policy = 'permit (principal in Group::"acme/engineers", action, resource);'
    # No name that an issuer may give reaches into another tenant.
    names = ["acme/engineers", '"]acme/engineers', "../acme"]
    questions = (asked(principal={"tenant": "evil"}), asked(principal={"tenant": "evil", "groups": names}))
    assert decide(policy, *questions) == [False, False]


def test_a_policy_that_fails_means_no() -> None:
    """The sum overflows. Cedar would pass over the forbid; here an error is a no, by the policy that failed."""
    policy = f"""
        @id("all") permit ({FAMILY});
        @id("sum") forbid ({FAMILY}) when {{ context.sealed_bytes * 9223372036854775807 > 0 }};
    """
    policies = PolicySet.parse(SCHEMA, {"x.cedar": policy})
    assert policies.decide(asked(sealed_bytes=3)) == Decision(False, ("sum",))
    assert policies.decide(asked(sealed_bytes=0)) == Decision(True, ("all",))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\tb", 'User::"root"', "é", "🙂"])
def test_names_are_data(name: str) -> None:
    policy = f'permit ({FAMILY}) when {{ principal in Tenant::"acme" }};'
    assert decide(policy, asked(principal={"subject": name, "groups": [name]}, model=name, pool=name)) == [True]


def test_what_was_decided_is_remembered_and_bounded() -> None:
    policies = PolicySet.parse(SCHEMA, {"x.cedar": f'@id("x") permit ({FAMILY}) when {{ context.max_tokens < 3 }};'})
    question = asked(max_tokens=0)
    assert isinstance(question, Question)
    first = policies.decide(question)
    assert policies.decide(asked(max_tokens=0)) == first
    assert policies.evaluated == 1
    many = [policies.decide(replace(question, max_tokens=number)).allowed for number in range(MAX_DECISIONS + 1)]
    assert many == [True] * 3 + [False] * (MAX_DECISIONS - 2)
    before = policies.evaluated
    assert policies.decide(asked(max_tokens=0)) == first
    assert policies.evaluated == before + 1
    assert (first.policy_set, len(first.entities)) == (policies.digest, 64)


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        ('@id("x") permit (principal, action, resource) when { context.prompt == "x" };', "schema"),
        ('@id("x") permit (principal, action == Action::"fly", resource);', "schema"),
        ('@id("x") permit (principal in Pool::"default", action, resource);', "schema"),
        ('@id("x") permit (principal, action, resource) when { context.hour };', "schema"),
        ('@id("x") permit (principal, action, resource) when { context.max_tokens > 1 };', "schema"),  # not of admin:*
        (f'@id("x") permit ({FAMILY}) when {{ context.plan == "gold" }};', "schema"),  # without `has`
        ('@id("x") permit everything;', SYNTAX),
        ('@id("x") permit (', SYNTAX),
        ('@id("x") permit (principal == ?principal, action, resource);', SYNTAX),
        (f'@id("x") permit ({FAMILY}) when {{ {" && ".join(["true"] * 200)} }};', SYNTAX),
        ("permit (principal, action, resource);", NAMES),
        ('@id("") permit (principal, action, resource);', NAMES),
        ('@id("x") permit (principal, action, resource); @id("x") permit (principal, action, resource);', NAMES),
    ],
)
def test_policies_that_cannot_be_used(policy: str, fault: str) -> None:
    with pytest.raises(PolicyError, match=r"^policies: x\.cedar: ") as refused:
        PolicySet.parse(SCHEMA, {"x.cedar": policy})
    assert (refused.value.fault, refused.value.place) == (fault, "x.cedar")


def test_broken_sets_of_texts() -> None:
    policy = '@id("x") permit (principal, action, resource);'
    with pytest.raises(PolicyError, match="two policies"):
        PolicySet.parse(SCHEMA, {"a.cedar": policy, "b.cedar": policy})
    with pytest.raises(SettingsError, match=r"^policies: the schema"):
        PolicySet.parse("entity;", {})


@pytest.mark.parametrize("word", ["  hour: Long,", "principal: [User],", "in [Group, Tenant]", "  name: String,"])
def test_a_schema_that_takes_no_question_of_a_gateway(word: str, tmp_path: Path) -> None:
    """Whoever writes one of their own must not find out by every request being denied."""
    folder = copied(tmp_path)
    (folder / "default.cedar").write_text('@id("x") permit (principal, action in Action::"sealed", resource);')
    assert word in SCHEMA
    (folder / SCHEMA_FILE).write_text(SCHEMA.replace(word, word.replace("User", "Tenant") if "User]" in word else "", 1))
    with pytest.raises(PolicyError, match="question about 'chat' does not fit") as refused:
        RuleSet.read(folder)
    assert refused.value.place == SCHEMA_FILE


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sets(kind: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    spoil, fault, place = BROKEN[kind]
    spoil(folder)
    with pytest.raises(PolicyError) as refused:
        RuleSet.load(folder)
    assert (refused.value.fault, refused.value.place) == (fault, place)
    assert str(refused.value).startswith("policies: ")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as refused:
        RuleSet.load(tmp_path / "none")
    assert refused.value.fault == MISSING
    assert RuleSet.load(copied(tmp_path)).digest == RULES.digest
    own = tmp_path / "own"
    own.mkdir()
    for name in (SCHEMA_FILE, "plans.toml"):
        shutil.copy(shipped() / name, own)
    (own / "a.cedar").write_text('@id("a") permit (principal, action, resource);')
    (own / "b.cedar").write_text(f'@id("b") forbid ({FAMILY}) unless {{ context.post_quantum }};')
    with pytest.raises(PolicyError, match="nothing tests the rules: write some into cases/ALLOW and cases/DENY") as refused:
        RuleSet.load(own)
    assert refused.value.place == "cases"
    (own / NO_CASES).touch()
    policies = RuleSet.load(own).policies
    assert policies.decide(asked()) == Decision(True, ("a",))
    assert policies.decide(asked(kem="X25519")) == Decision(False, ("b",))
