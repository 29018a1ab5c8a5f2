"""A caller with a genuine token whose claims say less than they should, or show other than they are."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from hostile.attacks import Verdict, attack
from lacre import problems
from lacre_fabric.logs import make_log
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.auth.tokens import Authenticator
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.settings import Issuer as IssuerSettings
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.memory_fabric import MemoryFabric


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


async def shown(issuer: Issuer, verdict: Verdict, claims: dict[str, Any]) -> None:
    """To a gateway whose settings say no more than they must."""
    log = make_log(io.StringIO())
    table = {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ("EdDSA",), "jwks": issuer.jwks()}
    revocations = RevocationList(log)
    await revocations.refresh(MemoryFabric().gateway())
    auth = Authenticator(trusted([IssuerSettings.model_validate(table)], log), revocations, FailureThrottle(9), time.time)
    with pytest.raises(Refusal) as refused:
        await auth.authenticate(f"Bearer {issuer.token(**claims)}".encode(), "192.0.2.1")
    verdict.said(refused.value.problem.type)


@attack("join so many groups that the token only links to them, which hides one that a rule forbids", "client",
        "a token whose groups are elsewhere is refused, unless the settings say otherwise",
        problems.CLAIMS_ELSEWHERE)  # fmt: skip
@pytest.mark.parametrize(
    "claims",
    [
        {"hasgroups": True},
        {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": "https://graph.example"}}},
        {"groups": ["staff"], "_claim_names": {"groups": "src1"}},
    ],
    ids=["marked", "distributed", "in part"],
)
async def test_groups_elsewhere(issuer: Issuer, verdict: Verdict, claims: dict[str, Any]) -> None:
    await shown(issuer, verdict, claims)


@attack("carry a name that reverses the text around it, so that a list of callers shows another name", "client",
        "a name with control characters, or with characters that reorder text, is refused",
        problems.UNUSABLE_CLAIMS)  # fmt: skip
@pytest.mark.parametrize("name", ["nimda\u202e", "\u2066admin\u2069", "alice\u2028admin", "alice\x1b[2K"], ids=ascii)
async def test_name_that_shows_another(issuer: Issuer, verdict: Verdict, name: str) -> None:
    await shown(issuer, verdict, {"sub": name})


@attack("use a token without a tenant, which would count as the tenant called default", "client",
        "a token that names no tenant is refused, unless the settings name one for it", problems.UNUSABLE_CLAIMS)  # fmt: skip
async def test_no_tenant(issuer: Issuer, verdict: Verdict) -> None:
    await shown(issuer, verdict, {"tenant": None})
