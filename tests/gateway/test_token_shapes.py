"""One table of tokens as issuers really write them, and as they should not: what each is read as, or why it is refused.

A row has the claims beside those that every token here has (`iss`, `aud`, `iat`, `exp`, `sub`), the issuer's settings beside
its keys, and what must come of it. A claim that is `DROP` is left out. Times are in seconds from now.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2
import jwt
import pytest

from lacre import problems
from lacre.problems import Problem, details
from lacre_fabric.logs import make_log
from lacre_gateway import settings
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.auth.tokens import Authenticator, Principal
from lacre_gateway.doctor.findings import Findings
from lacre_gateway.doctor.trust import _issuer
from lacre_gateway.http.refusal import Refusal
from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage

DROP: Final = object()


@dataclass(frozen=True)
class At:
    """So many seconds from now, in the form that `form` makes of it."""

    seconds: float
    form: type = int


@dataclass(frozen=True)
class Caller:
    """What the token is read as; the rest is the same in every row."""

    subject: str = "u"
    tenant: str = "acme"
    groups: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    plan: str | None = None
    jti: str | None = None


@dataclass(frozen=True)
class Refused:
    """What its bearer is told. claim, reason: None for what is told to nobody."""

    claim: str | None
    reason: str | None = "malformed"
    problem: Problem = problems.UNUSABLE_CLAIMS


@dataclass(frozen=True)
class Row:
    name: str
    claims: dict[str, Any]
    expected: Caller | Refused
    settings: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)


def elsewhere(claim: str) -> Refused:
    return Refused(claim, "elsewhere", problems.CLAIMS_ELSEWHERE)


NOBODY: Final = Refused(None, None, problems.INVALID_TOKEN)
BOUND_OTHERWISE: Final = Refused("cnf", "bound-in-another-way")
BY_ROLES: Final = {"claims": {"groups": "realm_access.roles"}}
BY_CLAIM: Final = {"tenant": None}  # settings in which the token says its tenant
GRAPH: Final = {"src1": {"endpoint": "https://graph.microsoft.com/v1.0/users/u/getMemberObjects"}}
TID: Final = "72f988bf-86f1-41af-91ab-2d7cd011db47"
AUTH0: Final = "https://example.com/"
MANY: Final = [f"group-{number:03}" for number in range(256)]

_KEYCLOAK = [
    Row("keycloak: realm roles", {"typ": "Bearer", "azp": "app", "realm_access": {"roles": ["offline_access", "staff"]}},
        Caller(groups=("offline_access", "staff")), BY_ROLES),
    Row("keycloak: roles of a client with dots",
        {"resource_access": {"my.app": {"roles": ["admin"]}, "account": {"roles": ["x"]}}},
        Caller(groups=("admin",)), {"claims": {"groups": ["resource_access", "my.app", "roles"]}}),
    Row("keycloak: no roles at all", {"realm_access": {}}, Caller(), BY_ROLES),
    Row("keycloak: no realm_access", {}, Caller(), BY_ROLES),
    Row("keycloak: realm_access is null", {"realm_access": None}, Caller(), BY_ROLES),
    Row("keycloak: organisation as a tenant", {"organization": {"id": "o1"}}, Caller(tenant="o1"),
        {**BY_CLAIM, "claims": {"tenant": "organization.id"}}),
    Row("keycloak: roles through text", {"realm_access": "staff"}, Refused("groups"), BY_ROLES),
    Row("keycloak: roles through a list", {"realm_access": [{"roles": ["a"]}]}, Refused("groups"),
        BY_ROLES),
]  # fmt: skip

_ENTRA = [
    Row("entra v2: delegated", {"ver": "2.0", "tid": TID, "scp": "Chat.Read Chat.Write", "roles": ["Writer"], "oid": "o"},
        Caller(tenant=TID, groups=("Writer",), scopes=("Chat.Read", "Chat.Write")),
        {**BY_CLAIM, "claims": {"groups": "roles", "tenant": "tid"}}),
    Row("entra v1: delegated", {"ver": "1.0", "tid": TID, "scp": "user_impersonation", "appid": "a", "upn": "u@example.com"},
        Caller(scopes=("user_impersonation",))),
    Row("entra: app only", {"idtyp": "app", "roles": ["Task.All"], "appid": "a", "azpacr": "1"}, Caller(groups=("Task.All",)),
        {"claims": {"groups": "roles"}}),
    Row("entra: overage", {"_claim_names": {"groups": "src1"}, "_claim_sources": GRAPH}, elsewhere("groups")),
    Row("entra: overage, hasgroups", {"hasgroups": True}, elsewhere("groups")),
    Row("entra: overage, hasgroups as text", {"hasgroups": "true"}, elsewhere("groups")),
    Row("entra: hasgroups says no", {"hasgroups": False}, Caller()),
    Row("entra: overage beside some groups", {"groups": ["a"], "_claim_names": {"groups": "src1"}}, elsewhere("groups")),
    Row("entra: overage in a claim of its own", {"groups:src1": GRAPH["src1"]}, elsewhere("groups")),
    Row("entra: link to the groups", {"http://schemas.microsoft.com/claims/groups.link": "https://graph.microsoft.com"},
        elsewhere("groups")),
    Row("entra: overage where app roles count", {"_claim_names": {"groups": "src1"}, "roles": ["Writer"]},
        Caller(groups=("Writer",)), {"claims": {"groups": "roles"}}),
    Row("entra: hasgroups where app roles count", {"hasgroups": True, "roles": ["Writer"]}, Caller(groups=("Writer",)),
        {"claims": {"groups": "roles"}}),
    Row("entra: overage that the settings ignore", {"_claim_names": {"groups": "src1"}, "hasgroups": True}, Caller(),
        {"claims_elsewhere": "ignore"}),
]  # fmt: skip

_DISTRIBUTED = [
    Row("openid: plan elsewhere", {"_claim_names": {"plan": "s"}}, elsewhere("plan")),
    Row("openid: scope elsewhere", {"_claim_names": {"scope": "s"}}, elsewhere("scope")),
    Row("openid: tenant elsewhere", {"_claim_names": {"tenant": "s"}}, elsewhere("tenant"),
        {**BY_CLAIM, "default_tenant": "t"}),
    Row("openid: tenant elsewhere, where the settings have it", {"_claim_names": {"tenant": "s"}}, Caller()),
    Row("openid: nested groups elsewhere", {"_claim_names": {"realm_access": "s"}}, elsewhere("groups"),
        BY_ROLES),
    Row("openid: another claim elsewhere", {"_claim_names": {"address": "s"}, "_claim_sources": {"s": {"JWT": "x"}}}, Caller()),
    Row("openid: none elsewhere", {"_claim_names": {}}, Caller()),
    Row("openid: names that are null", {"_claim_names": None}, Caller()),
    Row("openid: names that are a list", {"_claim_names": ["groups"]}, Refused("_claim_names")),
    Row("openid: names that are text", {"_claim_names": "groups"}, Refused("_claim_names")),
]  # fmt: skip

_OTHERS = [
    Row("auth0: namespaced roles", {AUTH0 + "roles": ["admin"], "permissions": ["read:x"], "gty": "client-credentials"},
        Caller(groups=("admin",), scopes=("read:x",)), {"claims": {"groups": AUTH0 + "roles", "scopes": "permissions"}}),
    Row("auth0: namespaced, as a list", {"https://my.app.example/groups": ["a"]}, Caller(groups=("a",)),
        {"claims": {"groups": ["https://my.app.example/groups"]}}),
    Row("auth0: org_id as a tenant", {"org_id": "org_9ybs"}, Caller(tenant="org_9ybs"),
        {**BY_CLAIM, "claims": {"tenant": "org_id"}}),
    Row("okta: groups and scp", {"groups": ["Everyone", "Ops"], "scp": ["openid", "lacre:http"], "cid": "0oa", "uid": "00u"},
        Caller(groups=("Everyone", "Ops"), scopes=("lacre:http", "openid"))),
    Row("okta: subject is a mail address", {"sub": "u@example.com", "jti": "AT.x"}, Caller("u@example.com", jti="AT.x")),
    Row("github actions", {"sub": "repo:octo/app:environment:prod", "repository_owner": "octo", "ref": "refs/heads/main",
                           "run_id": "1", "environment": "prod"},
        Caller("repo:octo/app:environment:prod", "octo", groups=("prod",)),
        {**BY_CLAIM, "claims": {"tenant": "repository_owner", "groups": "environment"}}),
    Row("kubernetes: service account",
        {"sub": "system:serviceaccount:team-a:web", "aud": ["lacre"],
         "kubernetes.io": {"namespace": "team-a", "serviceaccount": {"name": "web", "uid": "1"}}},
        Caller("system:serviceaccount:team-a:web", "team-a", groups=("web",)),
        {**BY_CLAIM,
         "claims": {"tenant": ["kubernetes.io", "namespace"], "groups": ["kubernetes.io", "serviceaccount", "name"]}}),
    Row("kubernetes: a year long", {"exp": At(365 * 86400)}, Refused("exp", "lives-too-long")),
    Row("kubernetes: a year long, as its settings allow", {"exp": At(365 * 86400)}, Caller(), {"token_lifetime": 366 * 86400}),
    Row("google: hosted domain", {"sub": "110169484474386276334", "hd": "example.com", "email_verified": True, "azp": "x"},
        Caller("110169484474386276334", "example.com"), {**BY_CLAIM, "claims": {"tenant": "hd"}}),
    Row("google: a private account has no domain", {}, Refused("tenant", "missing"), {**BY_CLAIM, "claims": {"tenant": "hd"}}),
    Row("adfs: a role by its long name", {"http://schemas.microsoft.com/ws/2008/06/identity/claims/role": "Domain Users"},
        Caller(groups=("Domain Users",)), {"claims": {"groups": "http://schemas.microsoft.com/ws/2008/06/identity/claims/role"}}),
    Row("cognito: id token", {"cognito:groups": ["eu-west-1_x_Google", "staff"], "token_use": "id"},
        Caller(groups=("eu-west-1_x_Google", "staff")), {"claims": {"groups": "cognito:groups"}}),
    Row("gitlab: job token",
        {"sub": "project_path:a/b:ref_type:branch:ref:main", "namespace_path": "a", "groups_direct": ["g"]},
        Caller("project_path:a/b:ref_type:branch:ref:main", "a", groups=("g",)),
        {**BY_CLAIM, "claims": {"tenant": "namespace_path", "groups": "groups_direct"}}),
    Row("zitadel: roles as an object", {"urn:zitadel:iam:org:project:roles": {"admin": {"1": "x"}}}, Refused("groups"),
        {"claims": {"groups": "urn:zitadel:iam:org:project:roles"}}),
]  # fmt: skip

_GROUPS = [
    *(Row(f"groups: {name}", {} if value is DROP else {"groups": value}, Caller(groups=groups)) for name, value, groups in (
        ("absent", DROP, ()), ("null", None, ()), ("empty list", [], ()), ("empty text", "", ()),
        ("list of an empty text", ["", "a"], ("a",)), ("one text", "admins", ("admins",)),
        ("one text with spaces", " Contractor  Admins ", (" Contractor  Admins ",)), ("one text with commas", "a,b", ("a,b",)),
        ("one text that looks like a list", '["a","b"]', ('["a","b"]',)), ("twice", ["b", "a", "b"], ("a", "b")),
        ("spaces in a list", ["Contractor Admins"], ("Contractor Admins",)), ("a long name", ["g" * 256], ("g" * 256,)),
        ("case is kept", ["Admins", "admins"], ("Admins", "admins")), ("as many as are taken", MANY, tuple(MANY)),
    )),
    *(Row(f"groups: {name}", {"groups": value}, Refused("groups")) for name, value in {
        "a number": 5, "a truth value": True, "false": False, "an object": {"a": 1}, "text and numbers": ["a", 7],
        "text and null": ["a", None], "lists in a list": [["a"]], "objects with names": [{"name": "a"}],
        "too long a name": ["g" * 257], "numbers": [1, 2],
    }.items()),
    Row("groups: one too many", {"groups": [*MANY, "z"]}, Refused("groups", "too-many")),
]  # fmt: skip

_NAMES = [
    Row(f"name: {name}", {"sub": text, "groups": [text]}, Caller(text, groups=(text,)))
    for name, text in {
        "ideographic space": "山田\u3000太郎", "no-break space": "Équipe\u00a0A", "zero width joiner": "👩\u200d🚒",
        "zero width non-joiner": "می\u200cخواهم", "thin space": "a\u2009b", "composed": "Jos\u00e9", "decomposed": "Jose\u0301",
        "right-to-left mark": "\u200fדוד", "soft hyphen": "Donau\u00addampf", "byte order mark": "\ufeffadmin",
        "private use": "\ue000", "beyond the first plane": "𠮷野家", "flag of tags": "🏴\U000e0067\U000e0062\U000e007f",
        "not assigned yet": "\U0003fff0", "quotes and backslashes": '"a\\b\'', "percent and braces": "%s {0} ${x}",
        "spaces around": " a ", "markup": "<b>&amp;[red]", "a path": "../../etc/passwd", "greek question mark": "a\u037eb",
    }.items()
]  # fmt: skip
_NO_NAMES = [
    Row(f"no name: {name}", {"groups": [text]}, Refused("groups"))
    for name, text in {
        "line feed": "a\nb", "carriage return": "a\rb", "tab": "a\tb", "escape": "\x1b[31m", "zero": "a\x00", "delete": "\x7f",
        "next line": "a\x85b", "line separator": "a\u2028b", "paragraph separator": "a\u2029b",
        "right-to-left override": "nimda\u202e", "right-to-left embedding": "\u202badmin", "isolate": "\u2067a\u2069",
        "half a character": "\ud83d", "no character": "\uffff", "no character of plane 0": "\ufdd0",
    }.items()
]  # fmt: skip

_MALFORMED = [
    Row(f"{claim}: {name}", {claim: value}, Refused(claim), settings)
    for claim, settings, values in (
        ("sub", {}, {"empty": "", "a number": 7, "a list": ["u"], "too long": "u" * 257, "a line break": "alice\nroot",
                     "half a character": "\ud800"}),
        ("jti", {}, {"a number": 7}),
        ("plan", {}, {"empty": "", "a list": ["gold"]}),
        ("tenant", BY_CLAIM, {"a list": ["acme"], "a slash": "a/b", "a number": 7, "another alphabet": "аcme"}),
        ("scope", {}, {"a tab": "a\tlacre:admin", "a number": 1, "an object": {"a": True}}),
        ("exp", {}, {"huge": 10**400, "1e300": 1e300, "text": At(600, str), "true": True}),
        ("iat", {}, {"text": At(-5, str)}),
    )
    for name, value in values.items()
]  # fmt: skip

_MISSING = [
    Row(f"{claim}: {name}", {claim: value}, Refused(claim, "missing"), settings)
    for claim, name, value, settings in (
        ("sub", "absent", DROP, {}), ("sub", "null", None, {}), ("exp", "absent", DROP, {}), ("exp", "null", None, {}),
        ("iat", "absent", DROP, {}), ("aud", "empty list", [], {}), ("aud", "absent", DROP, {}),
        ("tenant", "absent", DROP, BY_CLAIM), ("tenant", "null", None, BY_CLAIM),
    )
]  # fmt: skip

_PLANS_AND_TENANTS = [
    Row("plan: named", {"plan": "gold"}, Caller(plan="gold")),
    Row("plan: null", {"plan": None}, Caller()),
    Row("tenant: named by the token", {"tenant": "t1"}, Caller(tenant="t1"), BY_CLAIM),
    Row("tenant: the settings' own, whatever the token says", {"tenant": "t1"}, Caller()),
    Row("tenant: absent, with a default", {}, Caller(tenant="default"), {**BY_CLAIM, "default_tenant": "default"}),
    Row("tenant: named, with a default", {"tenant": "t1"}, Caller(tenant="t1"), {**BY_CLAIM, "default_tenant": "default"}),
    Row("tenant: empty, with a default", {"tenant": ""}, Refused("tenant"), {**BY_CLAIM, "default_tenant": "default"}),
]  # fmt: skip

_SCOPES = [
    Row(f"scope: {name}", claims, Caller(scopes=scopes))
    for name, claims, scopes in (
        ("spaces divide", {"scope": "b a"}, ("a", "b")), ("several spaces", {"scope": "  a   b "}, ("a", "b")),
        ("empty", {"scope": ""}, ()), ("null, and scp", {"scope": None, "scp": "a b"}, ("a", "b")),
        ("before scp", {"scope": "a", "scp": ["b"]}, ("a",)), ("a list", {"scope": ["a", "b"]}, ("a", "b")),
        ("an element of a list is one scope", {"scope": ["a lacre:admin"]}, ("a lacre:admin",)),
        ("no-break space does not divide", {"scope": "a\u00a0lacre:admin"}, ("a\u00a0lacre:admin",)),
    )
]  # fmt: skip

_TIMES = [
    Row(f"{claim}: {name}", {claim: value}, Refused(claim, reason, problems.INVALID_TOKEN))
    for claim, reason, values in (
        ("exp", "expired", {"over": At(-60), "negative": -5, "before all time": -(2**52)}),
        ("iat", "not-yet-valid", {"in the future": At(300)}),
        ("nbf", "not-yet-valid", {"in the future": At(600)}),
        ("aud", "for-another-audience", {"another": "x", "case matters": "Lacre", "a number in the list": ["lacre", 7]}),
    )
    for name, value in values.items()
] + [
    Row(f"{claim}: {name}", {claim: value}, expected)
    for expected, claim, values in (
        (Caller(), "exp", {"a float": At(600, float), "over, within the leeway": At(-5)}),
        (Caller(), "iat", {"ahead within the leeway": At(5)}),
        (Caller(), "nbf", {"past": At(-60)}),
        (Caller(), "aud", {"one of a list": ["x", "lacre"]}),
        (NOBODY, "exp", {"infinite": float("inf"), "no number": "soon"}),
        (NOBODY, "nbf", {"null": None}),
        (NOBODY, "iss", {"another": "https://other.example", "a slash more": "https://issuer.example/", "absent": DROP,
                         "a list": ["https://issuer.example"], "another alphabet": "https://іssuer.example"}),
        (BOUND_OTHERWISE, "cnf", {"a certificate": {"x5t#S256": "A" * 43}, "nothing": {},
                                  "two ways": {"jkt": "A" * 43, "x5t#S256": "A" * 43}}),
    )
    for name, value in values.items()
] + [
    Row(f"typ: {name}", {}, expected, headers={"typ": typ})
    for name, typ, expected in (
        ("at+jwt", "at+jwt", Caller()), ("in its long form", "application/at+jwt", Caller()),
        ("in other letters", "jwt", Caller()), ("absent", None, Caller()),
        ("a logout token", "logout+jwt", NOBODY), ("a DPoP proof", "dpop+jwt", NOBODY),
    )
]  # fmt: skip

ROWS: Final = (
    *_KEYCLOAK, *_ENTRA, *_DISTRIBUTED, *_OTHERS, *_GROUPS, *_NAMES, *_NO_NAMES, *_MALFORMED, *_MISSING, *_PLANS_AND_TENANTS,
    *_SCOPES, *_TIMES,
)  # fmt: skip


# Through the authenticator that real settings make


ISSUER = "https://issuer.example"


def written(claims: dict[str, Any]) -> bytes:
    """The payload: as JSON of ASCII alone, in which every text can be."""
    now = int(time.time())
    standard = {"iss": ISSUER, "aud": "lacre", "sub": "u", "iat": now - 5, "exp": now + 600}
    said = {name: value for name, value in {**standard, **claims}.items() if value is not DROP}
    return json.dumps(
        {name: value.form(now + value.seconds) if isinstance(value, At) else value for name, value in said.items()}
    ).encode()


def configured(issuer: Issuer, changes: dict[str, Any]) -> settings.Issuer:
    usual = {"issuer": ISSUER, "audience": "lacre", "algorithms": ("EdDSA",), "jwks": issuer.jwks(), "tenant": "acme"}
    return settings.Issuer.model_validate({**usual, **changes})


def authenticator(issuer: Issuer, changes: dict[str, Any]) -> Authenticator:
    log = make_log(io.StringIO())
    revocations = RevocationList(log)
    asyncio.run(revocations.refresh(MemoryFabric().gateway()))
    return Authenticator(trusted([configured(issuer, changes)], log), revocations, FailureThrottle(9), time.time)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_is_read_or_refused_as_its_row_says(row: Row, issuer: Issuer) -> None:
    token = jwt.api_jws.encode(written(row.claims), issuer.ed, "EdDSA", headers={"kid": "ed", **row.headers})
    asking = authenticator(issuer, row.settings).authenticate(f"Bearer {token}".encode(), "192.0.2.1")
    if isinstance(expected := row.expected, Caller):
        assert asyncio.run(asking).principal == Principal(issuer=ISSUER, **dataclasses.asdict(expected))
        return
    with pytest.raises(Refusal) as refused:
        asyncio.run(asking)
    told = details.read(refused.value.answer(None)[1])
    said = Refused(told.get("claim"), told.get("reason"), refused.value.problem)  # type: ignore[arg-type]
    assert (said, "expired_at" in told) == (expected, expected.reason == "expired")


def test_the_table_has_each_row_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 100


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "are for the tenant acme"),
    ({"tenant": None}, "name their tenant in tenant, and those that do not are refused"),
    ({"tenant": None, "default_tenant": "all", "claims": {"tenant": "org.id"}},
     "in org.id, and those that do not speak for all"),
])  # fmt: skip
async def test_the_doctor_says_whom_an_issuer_s_tokens_speak_for(changes: dict[str, Any], said: str, issuer: Issuer) -> None:
    findings = Findings()
    await _issuer(configured(issuer, changes), "issuers.0", findings)
    [finding] = findings.found
    assert finding.detail.endswith(said)


NAMES = [row for row in ROWS if row.name.startswith("name: ")]


async def test_every_name_that_is_read_is_served(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Policy, budgets and the audit log take them as they are."""
    for number, row in enumerate(NAMES, 1):
        response = await stage.post(client, stage.issuer.token(**row.claims))
        assert (row.name, response.status_code) == (row.name, 200)
        assert response.headers["lacre-audit"].isascii()
        intent = [entry for entry in await stage.trail(number) if entry["kind"] == "intent"][-1]
        assert (intent["subject"], intent["groups"]) == (row.claims["sub"], row.claims["groups"])


async def test_a_name_that_no_text_could_hold_safely_is_in_no_log(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, stage.issuer.token(sub="mallory\u2028root"))
    assert response.status_code == 401
    line = [entry for entry in stage.logged() if entry["event"] == "request"][-1]
    assert (line["problem"], line["reason"]) == ("unusable-claims", "sub: malformed")
    assert "mallory" not in stage.log.getvalue()
