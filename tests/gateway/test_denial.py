"""What a denied caller is told: the one thing that would do, under the shipped rules and under others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import lacre
from lacre import problems
from lacre.exchange.model_paths import KNOWN
from lacre.problems import Problem
from lacre.problems.details import MAX_LISTED
from lacre.wire.header import Kem
from lacre.wire.outer import MAX_TOKENS
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy.cedar import PolicySet
from lacre_gateway.policy.denial import denied, usable
from lacre_gateway.policy.question import Question
from parts.keys import MODEL
from parts.policies import RULES, SCHEMA, asked
from parts.stage import Stage

MODELS = ("smollm2-135m", "large", "secret")


def question(**changes: Any) -> Question:
    found = asked()
    assert isinstance(found, Question)
    return replace(found, **changes)


def policies(*texts: str) -> PolicySet:
    return PolicySet.parse(SCHEMA, {f"{number}.cedar": f'@id("{number}") {text}' for number, text in enumerate(texts)})


ALL = "permit (principal, action, resource);"
SEALED = 'forbid (principal, action in Action::"sealed", resource)'
SHIPPED = RULES.policies
MOST = {"limit": "max_tokens", "scope": "policy", "unit": "tokens"}


@pytest.mark.parametrize(
    ("rules", "changes", "problem", "details"),
    [
        (SHIPPED, {"max_tokens": 100_000}, problems.TOO_MANY_TOKENS, {**MOST, "ceiling": 32768, "asked": 100_000}),
        (SHIPPED, {"max_tokens": 32769}, problems.TOO_MANY_TOKENS, {**MOST, "ceiling": 32768, "asked": 32769}),
        (SHIPPED, {"max_tokens": MAX_TOKENS}, problems.TOO_MANY_TOKENS, {**MOST, "ceiling": 32768, "asked": MAX_TOKENS}),
        (SHIPPED, {"action": Action.HTTP}, problems.PATH_NOT_ALLOWED, {"paths": KNOWN}),
        (SHIPPED, {"action": Action.HTTP, "max_tokens": 100_000}, problems.PATH_NOT_ALLOWED, {"paths": KNOWN}),
        (policies(ALL, SEALED + " when { context.max_tokens > 1 };"), {"max_tokens": 2}, problems.TOO_MANY_TOKENS,
         {**MOST, "ceiling": 1, "asked": 2}),
        (policies(ALL, SEALED + " when { context.max_tokens > 9 };"), {"max_tokens": 10, "action": Action.HTTP},
         problems.TOO_MANY_TOKENS, {**MOST, "unit": "KiB", "ceiling": 9, "asked": 10}),
        (policies(ALL, SEALED + " when { context.sealed_bytes > 4096 };"), {"sealed_bytes": 9000}, problems.FORBIDDEN,
         {"limit": "sealed_bytes", "scope": "policy", "unit": "bytes", "ceiling": 4096, "asked": 9000}),
        (policies(ALL, SEALED + ' unless { context.shape == "pad" };'), {"shape": Shape.NONE}, problems.FORBIDDEN,
         {"reason": "shape"}),
        (policies(ALL, SEALED + " unless { context.post_quantum };"), {"kem": Kem.X25519}, problems.FORBIDDEN,
         {"reason": "kem"}),
        (policies(ALL, SEALED + ' when { resource.name != "large" };'), {}, problems.FORBIDDEN, {"models": ("large",)}),
        (policies('permit (principal in Group::"acme/nobody", action, resource);'), {}, problems.FORBIDDEN, {}),
        (policies(ALL, SEALED + ' when { principal in Tenant::"acme" };'), {"max_tokens": 100_000}, problems.FORBIDDEN, {}),
    ],
)  # fmt: skip
def test_each(rules: PolicySet, changes: dict[str, Any], problem: Problem, details: dict[str, Any]) -> None:
    refusal = denied(rules.would_allow, question(**changes), MODELS, ("base.a",))
    assert (refusal.problem, dict(refusal.details), refusal.noted) == (problem, details, "policy: forbidden by base.a")


def test_only_so_many_decisions_are_taken_and_none_is_remembered() -> None:
    taken = 0

    def count(one: Question) -> bool:
        nonlocal taken
        taken += 1
        return one.max_tokens == 1 or SHIPPED.would_allow(one)

    before = len(SHIPPED._verdicts._values)
    denied(count, question(max_tokens=MAX_TOKENS), MODELS, ())
    denied(lambda one: bool(count(one) and False), question(), [f"m{number}" for number in range(5000)], ())
    assert taken < 32 + 1 + MAX_LISTED + 10
    assert len(SHIPPED._verdicts._values) == before


def test_the_models_of_a_typo_are_those_that_policy_allows() -> None:
    rules = policies(ALL, SEALED + ' when { resource.name == "secret" };')
    assert usable(rules.would_allow, question(model="smollm", max_tokens=9), MODELS) == {"models": ("smollm2-135m", "large")}
    assert usable(policies(SEALED + ";").would_allow, question(model="smollm"), MODELS) == {}


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("POST", "/v1/threads", 404, "unknown-path", None),
        ("POST", "/v1//chat/completions", 404, "path-form", None),
        ("POST", "/v1/embeddings/", 404, "path-form", None),
        ("POST", "/v1/models", 405, "wrong-method", "GET"),
        ("DELETE", "/v1/models/tiny", 405, "wrong-method", "GET"),
    ],
)
async def test_a_client_hears_what_is_wrong_with_its_path(
    method: str, path: str, status: int, code: str, allow: str | None, stage: Stage
) -> None:
    response = await stage.client().request(method, f"{lacre.BASE_URL.removesuffix('/v1')}{path}", json={"model": MODEL})
    error = response.json()["error"]
    assert (response.status_code, error["code"], response.headers.get("allow")) == (status, code, allow)
    assert "Policy does not allow" not in error["message"]
    assert "/v1/" in error["message"]
    assert (await stage.trail())[1]["problem"] == "path-not-allowed"  # the gateway knows no more


async def test_a_client_hears_which_limit_it_is_and_which_models_there_are(stage: Stage) -> None:
    client = stage.client()
    with pytest.raises(lacre.Forbidden, match="at most 32768 tokens") as refused:
        await client.chat("Hello.", model=MODEL, max_tokens=100_000)
    assert refused.value.details["ceiling"] == 32768
    with pytest.raises(lacre.LacreError, match=rf"Models: {MODEL}\."):
        await client.chat("Hello.", model="smollm2-135M")
