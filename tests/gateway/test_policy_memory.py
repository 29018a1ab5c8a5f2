"""What a verdict is remembered by: all that the rules read of a question, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as some

from lacre.wire.header import Kem
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.cedar import PolicyError, PolicySet
from lacre_gateway.policy.question import AdminAction, AdminQuestion, AnyQuestion, Question
from parts.policies import ADMINISTRATION, FAMILY, RULES, SCHEMA

NOON = 1795780800.0  # 2026-11-27T12:00:00Z, a Friday
WHO = Principal("alice", "acme", "https://issuer.example", ("engineers",), ("a",), "gold", "id-1")
CHAT = Question(WHO, Action.CHAT, "default", "m", 256, 4096, Kem.XWING, Shape.NONE, "192.0.2.1", NOON)
USAGE = AdminQuestion(WHO, AdminAction.USAGE, "g1", "192.0.2.1", NOON)

# Few values of each, so that two questions often differ in one thing alone.
people = some.builds(
    Principal,
    subject=some.sampled_from(["alice", "bob"]),
    tenant=some.sampled_from(["acme", "other"]),
    issuer=some.sampled_from(["https://issuer.example", "https://evil.example"]),
    groups=some.sampled_from([(), ("engineers",), ("engineers", "sales")]),
    scopes=some.sampled_from([(), ("a",), ("a", "b")]),
    plan=some.sampled_from([None, "gold"]),
)
addresses = some.sampled_from(["192.0.2.1", "::ffff:192.0.2.1", "198.51.100.1", "::1", "nonsense", ""])
times = some.sampled_from([NOON, NOON + 60, NOON + 3600, NOON + 86400])
sealed = some.builds(
    Question,
    principal=people,
    action=some.sampled_from(Action),
    pool=some.sampled_from(["default", "other"]),
    model=some.sampled_from(["m", "n"]),
    max_tokens=some.sampled_from([1, 256]),
    sealed_bytes=some.sampled_from([1, 4096]),
    kem=some.sampled_from(Kem),
    shape=some.sampled_from(Shape),
    address=addresses,
    time=times,
)
administration = some.builds(
    AdminQuestion,
    principal=people,
    action=some.sampled_from(AdminAction),
    gateway=some.sampled_from(["g1", "g2"]),
    address=addresses,
    time=times,
)

OF_BOTH = [
    'principal == User::"acme/alice"', 'principal in Group::"acme/engineers"', 'principal in Tenant::"acme"',
    'principal in [Group::"acme/sales", Group::"other/sales"]', 'principal in User::"acme/bob"', "principal is User",
    'principal is User in Tenant::"other"', 'principal.name == "bob"', 'principal.issuer like "*evil*"',
    'User::"acme/alice" in Group::"acme/sales"', 'Group::"acme/engineers" in Tenant::"acme"',
    '{who: principal}.who == User::"acme/bob"', '(if context.hour > 11 then principal else User::"x").name == "alice"',
    'context.scopes.contains("b")', "context.scopes.isEmpty()", "context has plan",
    'context has plan && context.plan == "gold"',
    'context["hour"] == 12', "context.weekday == 5", "context.local_hour == 12", "context.local_minute == 1",
    'context.zone == "UTC"', "context.address.isLoopback()", 'context.address.isInRange(ip("192.0.2.0/24"))',
    "context == context", "{context: context}.context.hour == 13", "context.hour * 9223372036854775807 > 0",
]  # fmt: skip
OF_SEALED = [
    *OF_BOTH,
    'resource == Model::"default/m"', 'resource in Pool::"default"', 'resource.name == "n"',
    'resource is Model in Pool::"other"',
    'Model::"default/m" in Pool::"default"', 'action == Action::"chat"', 'action in Action::"sealed"',
    "context.max_tokens <= 1", "context.sealed_bytes < 5", "context.post_quantum", 'context.kem == "X25519"',
    'context.shape == "pad"', "context.sealed_bytes * 9223372036854775807 > 0", "[context.max_tokens, 256].contains(1)",
    "(if context.post_quantum then context else context).max_tokens == 1",
]  # fmt: skip
OF_ADMINISTRATORS = [*OF_BOTH, 'resource == Gateway::"g1"', 'action == Action::"admin:usage"']
PRINCIPALS = [
    "principal", "principal is User", 'principal == User::"acme/alice"', 'principal in Group::"acme/engineers"',
    'principal in Tenant::"acme"', 'principal is User in Group::"acme/sales"',
]  # fmt: skip
RESOURCES = {
    FAMILY: ["resource", 'resource in Pool::"default"', 'resource == Model::"default/m"', "resource is Model"],
    ADMINISTRATION: ["resource", 'resource == Gateway::"g1"', "resource is Gateway"],
}
ATOMS = {FAMILY: OF_SEALED, ADMINISTRATION: OF_ADMINISTRATORS}


@some.composite
def rules(draw: some.DrawFn) -> str:
    """One policy that fits the schema."""
    family = draw(some.sampled_from([FAMILY, FAMILY, ADMINISTRATION]))
    actions = family.split(", ")[1]
    scope = f"{draw(some.sampled_from(PRINCIPALS))}, {actions}, {draw(some.sampled_from(RESOURCES[family]))}"
    clauses = [
        f"{draw(some.sampled_from(['when', 'unless']))} {{ {draw(conditions(family))} }}"
        for _ in range(draw(some.integers(0, 2)))
    ]
    return f"{draw(some.sampled_from(['permit', 'permit', 'forbid']))} ({scope}) {' '.join(clauses)};"


def conditions(family: str) -> some.SearchStrategy[str]:
    return some.recursive(
        some.sampled_from(ATOMS[family]),
        lambda inner: some.one_of(
            some.builds("({} && {})".format, inner, inner),
            some.builds("({} || {})".format, inner, inner),
            some.builds("!({})".format, inner),
            some.builds("(if {} then {} else {})".format, inner, inner, inner),
        ),
        max_leaves=4,
    )


def parse(policies: list[str]) -> PolicySet:
    return PolicySet.parse(SCHEMA, {"x.cedar": "\n".join(f'@id("p{n}") {policy}' for n, policy in enumerate(policies))})


def forgetful(policies: PolicySet) -> PolicySet:
    """The same rules, which remember nothing yet."""
    return PolicySet(policies.schema, policies.policies, policies.names, policies.digest, policies.zone)


@given(some.lists(rules(), min_size=1, max_size=4), some.lists(some.one_of(sealed, sealed, administration), max_size=12))
def test_a_remembered_decision_is_the_fresh_one(policies: list[str], questions: list[AnyQuestion]) -> None:
    try:
        remembering = parse(policies)
    except PolicyError:  # two conditions that never hold together
        reject()
    for question in questions:
        assert remembering.decide(question) == forgetful(remembering).decide(question)


@pytest.mark.parametrize("family", ATOMS)
def test_each_thing_that_a_rule_can_read(family: str) -> None:
    """Every scope and condition alone, on every pair of questions that differ in one thing: none is remembered under too
    little.
    """
    base: AnyQuestion = CHAT if family == FAMILY else USAGE
    actions = family.split(", ")[1]
    policies = [f"permit ({who}, {actions}, {where});" for who in PRINCIPALS for where in RESOURCES[family]]
    for policy in (*policies, *(f"permit ({family}) when {{ {condition} }};" for condition in ATOMS[family])):
        fresh = parse([policy])
        for other in neighbours(base):
            remembering = forgetful(fresh)
            for question in (base, other, base):
                assert (policy, remembering.decide(question).allowed) == (policy, fresh.would_allow(question))


def neighbours(base: AnyQuestion) -> Iterator[AnyQuestion]:
    """Questions that differ from it in one thing."""
    who = base.principal
    people: list[dict[str, Any]] = [
        {"subject": "bob"}, {"tenant": "other"}, {"issuer": "https://evil.example"}, {"groups": ()},
        {"groups": ("engineers", "sales")}, {"scopes": ("a", "b")}, {"scopes": ()}, {"plan": None},
    ]  # fmt: skip
    things: list[dict[str, Any]] = [
        *({"principal": replace(who, **change)} for change in people),
        {"address": "::1"}, {"address": "nonsense"}, {"time": NOON + 60}, {"time": NOON + 3600}, {"time": NOON + 86400},
    ]  # fmt: skip
    if isinstance(base, Question):
        things += [
            {"pool": "other"}, {"model": "n"}, {"max_tokens": 1}, {"sealed_bytes": 1}, {"kem": Kem.X25519},
            {"shape": Shape.PAD}, {"action": Action.EMBED},
        ]  # fmt: skip
    else:
        things += [{"gateway": "g2"}, {"action": AdminAction.DRAIN}]
    for change in things:
        yield replace(base, **change)


def test_what_no_rule_reads_is_not_asked_again() -> None:
    """The rules that ship read scopes and the ceiling of output: sizes, models, callers and minutes share one verdict."""
    policies = forgetful(RULES.policies)
    alike: list[dict[str, Any]] = [
        {"principal": replace(WHO, subject="bob", groups=())}, {"principal": replace(WHO, tenant="other", plan=None)},
        {"pool": "other"}, {"model": "n"}, {"sealed_bytes": 1}, {"kem": Kem.X25519}, {"shape": Shape.PAD}, {"address": "::1"},
        {"time": NOON + 90_000},
    ]  # fmt: skip
    first = policies.decide(CHAT)
    for change in alike:
        decision = policies.decide(replace(CHAT, **change))
        assert (decision.allowed, decision.policies) == (first.allowed, first.policies)
    assert policies.evaluated == 1
    # The log names the parties of each question all the same.
    assert len({policies.decide(replace(CHAT, model=name)).entities for name in ("m", "n", "o")}) == 3
    for change in (
        {"max_tokens": 3},
        {"principal": replace(WHO, scopes=())},
        {"action": Action.EMBED},
        {"address": "nonsense"},
    ):
        before = policies.evaluated
        policies.decide(replace(CHAT, **change))
        assert policies.evaluated == before + 1


def test_one_group_s_callers_share_a_verdict() -> None:
    policies = parse(['permit (principal in Group::"acme/engineers", action, resource);'])
    assert policies.decide(CHAT).allowed
    assert policies.decide(replace(CHAT, principal=replace(WHO, subject="bob", issuer="https://other.example"))).allowed
    assert policies.evaluated == 1
    assert not policies.decide(replace(CHAT, principal=replace(WHO, groups=("sales",)))).allowed
