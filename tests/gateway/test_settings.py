"""The settings file and the plans file: what they mean, and an error for every mistake that names the key and the remedy."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lacre.errors import SettingsError
from lacre_gateway.budget.plans import LimitKind, PlanLimits, Plans, Price, money
from lacre_gateway.budget.plans import load as load_plans
from lacre_gateway.budget.plans import parse as parse_plans
from lacre_gateway.settings import GatewaySettings, load, parse, shipped

TEXT = """
gateway = "g1"
public_url = "https://gateway.example/"
trust = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
signing_key = "grant.pem"
audit = "/var/lib/lacre/audit"

[nats]
url = "nats://127.0.0.1:4222"
credentials = "gateway.json"

[[issuers]]
issuer = "https://issuer.example"
audience = "lacre"
algorithms = ["EdDSA", "PS256"]
jwks = "jwks.json"

[limits]
concurrent_per_subject = 100

[models."smollm2-135m"]
context = 2048
"""
PLACE = Path("/etc/lacre/gateway.toml")
ISSUERS = TEXT[TEXT.index("[[issuers]]") : TEXT.index("[limits]")]
KEYS = 'jwks = "jwks.json"'


def settings(old: str = "", new: str = "") -> GatewaySettings:
    """Of the text above, with `new` in the place of `old`."""
    assert old in TEXT
    return parse(TEXT.replace(old, new, 1), PLACE)


def test_values_and_defaults() -> None:
    found = settings()
    assert found.signing_key == Path("/etc/lacre/grant.pem")  # relative to the file
    assert found.audit == Path("/var/lib/lacre/audit")
    assert found.nats.credentials == Path("/etc/lacre/gateway.json")
    assert found.issuers[0].jwks == Path("/etc/lacre/jwks.json")
    assert found.public_url == "https://gateway.example"
    assert found.root == bytes(32)
    assert (found.listen.host, found.listen.port) == ("127.0.0.1", 8321)
    assert (found.limits.concurrent_per_subject, found.limits.queue_limit) == (100, 30.0)
    assert found.models["smollm2-135m"].context == 2048
    with pytest.raises(ValidationError):
        found.gateway = "g2"  # type: ignore[misc]


CLAIMS = ("groups", "tenant", "scopes", "plan")


@pytest.mark.parametrize(
    ("old", "new", "of_issuer"),
    [
        (KEYS, 'jwks = { keys = [{ kty = "OKP" }] }', {"jwks": {"keys": [{"kty": "OKP"}]}}),
        (KEYS, "", {"jwks": None, "jwks_url": None}),  # discovery
        (KEYS, 'jwks_url = "https://keys.example/set"', {"jwks": None, "jwks_url": "https://keys.example/set"}),
        *(('"https://issuer.example"', f'"{name}"', {"issuer": name}) for name in ("urn:i", "http://i.example", "i.example")),
        ("[limits]", '[issuers.claims]\ngroups = "realm_access.roles"\ntenant = ["https://e.com/t"]\nscopes = "s"\n[limits]',
         dict(zip(CLAIMS, (("realm_access", "roles"), ("https://e.com/t",), ("s",), ("plan",)), strict=True))),
        ("[limits]", '[issuers.claims]\ngroups = "https://my.app.example/roles"\n[limits]',
         {"groups": ("https://my.app.example/roles",)}),  # a URL is one claim's name
        (KEYS, KEYS, {"default_tenant": None, "claims_elsewhere": "refuse"}),
        (KEYS, KEYS + '\ndefault_tenant = "default"', {"default_tenant": "default"}),
        (KEYS, KEYS + '\nclaims_elsewhere = "ignore"', {"claims_elsewhere": "ignore"}),
    ],
)  # fmt: skip
def test_issuer(old: str, new: str, of_issuer: dict[str, Any]) -> None:
    issuer = settings(old, new).issuers[0]
    assert {name: getattr(issuer.claims if name in CLAIMS else issuer, name) for name in of_issuer} == of_issuer


# What is written in place of what; what the error must say.
MISTAKES: list[tuple[str, str, tuple[str, ...]]] = [
    ('audit = "', 'audti = "', ("audti: unknown key", "'audit'", "audit: missing")),
    ("concurrent_per_subject", "concurent_per_subject",
     ("limits.concurent_per_subject: unknown key", "'concurrent_per_subject'")),
    ("audience =", "audiense =", ("issuers.0.audiense: unknown key", "'audience'", "issuers.0.audience: missing")),
    ("context = ", "contxt = ", ("models.smollm2-135m.contxt: unknown key", "'context'")),
    ("[limits]", "[limit]", ("limit: unknown key", "'limits'")),
    ('"g1"', '"g1.*"', ("gateway: must match pattern",)),
    ('"https://gateway.example/"', '"gateway"', ("public_url: write an address such as https://",)),
    ("AAAA", "AA", ("trust: copy the whole root key",)),
    ('"nats://127.0.0.1:4222"', '"nats://user:s3cret@h:1"', ("nats.url: ", "nats.credentials")),
    ('"EdDSA", "PS256"', '"HS256"', ("issuers.0.algorithms.0: must be 'EdDSA'",)),
    ('["EdDSA", "PS256"]', "[]", ("issuers.0.algorithms: needs at least one entry",)),
    ('"jwks.json"', "3", ("issuers.0.jwks: write the path of a JWKS file",)),
    ("concurrent_per_subject = 100", "concurrent_per_subject = 0",
     ("limits.concurrent_per_subject: must be greater than 0",)),
    ("= 100", "= 100\nqueue_limit = 31", ("limits.queue_limit: must be less than or equal to 30",)),
    ("= 100", "= 100\ngrant_lifetime = 35.0", ("limits.grant_lifetime must exceed limits.queue_limit by 10 s",)),
    ("context = 2048", 'context = "many"', ("models.smollm2-135m.context: must be a valid integer",)),
    ("[nats]", "[nats", ("not TOML",)),
    (ISSUERS, "", ("issuers: missing",)),
    (ISSUERS, ISSUERS * 2, ("each issuer may appear once",)),
    (KEYS, KEYS + '\njwks_url = "https://keys.example/set"', ("in one place",)),
    (KEYS, KEYS + '\nca = "ca.pem"', ("`ca` is for keys that the gateway fetches",)),
    (KEYS, 'jwks_url = "http://127.0.0.1/set"\nca = "ca.pem"', ("`ca` is for https",)),
    (KEYS, KEYS + '\ntenant = "acme"\ndefault_tenant = "acme"', ("remove `default_tenant`",)),
    (KEYS, KEYS + '\nclaims_elsewhere = "ask"', ("issuers.0.claims_elsewhere",)),
    *((KEYS, f'{KEYS}\ndefault_tenant = "{name}"', ("issuers.0.default_tenant",)) for name in ("", "a/b")),
    *((KEYS, f'jwks_url = "{url}"', ("issuers.0.jwks_url: write the https address",))
      for url in ("http://keys.example/set", "keys.json", "https://user@keys.example/", "file:///etc/passwd")),
    *((ISSUERS, ISSUERS.replace("https://issuer.example", name).replace(KEYS, ""), ("must have an https address",))
      for name in ("urn:i", "http://i.example", "i.example")),  # discovery needs one
    *(("[limits]", f"[issuers.claims]\ngroups = {wrong}\n[limits]", ("issuers.0.claims.groups: write the claim's name",))
      for wrong in ('""', "[]", "3", '"a..b"', '["a", 3]')),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES)
def test_mistakes(old: str, new: str, said: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        settings(old, new)
    message = str(error.value)
    assert message.startswith("/etc/lacre/gateway.toml: ")
    assert [part for part in said if part not in message] == [], message
    assert not [word for word in ("s3cret", "pydantic", "Tuple") if word in message]


def test_an_instance_differs_by_its_name_alone() -> None:
    whole = settings()
    third = whole.as_instance(3)
    assert (third.instance, third.gateway) == (f"{whole.gateway}__3", whole.gateway)
    assert (third.audit, third.listen, third.admin, third.shared) == (whole.audit, whole.listen, whole.admin, False)
    assert third.audit_origin != whole.as_instance(2).audit_origin
    assert whole.for_process(3, 1).shared
    for number in (-1, 16):
        with pytest.raises(SettingsError, match="16 instances"):
            whole.as_instance(number)  # which the credential is not for
    with pytest.raises(SettingsError, match="processes"):
        settings("\ngateway", "\nprocesses = 2\ngateway").as_instance(0)


def test_a_file_that_is_read(tmp_path: Path) -> None:
    (path := tmp_path / "gateway.toml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # with a byte order mark
    assert load(path).signing_key == tmp_path / "grant.pem"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.replace("g1", "é").encode("latin-1"), "must be UTF-8"),
        (b"a = " + b"[" * 5000, "nested too deep"),
        (TEXT.replace("grant.pem", "a\\u0000b").encode(), "no null character"),
        (TEXT.replace("grant.pem", "~nobody-of-this-name/x").encode(), "no such home folder"),
        (None, "cannot read the settings file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "gateway.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        load(path)


def test_a_file_without_end() -> None:
    with pytest.raises(SettingsError, match="not a settings file"):
        load(Path("/dev/zero"))


# Plans


PLANS = """
currency = "EUR"
default_plan = "free"

[plans.free.user]
requests_per_minute = 10
tokens_per_day = 0

[plans.paid.tenant]
money_per_month = "30.000001"
tokens_per_minute = 1000
[plans.paid.everyone]
concurrent_streams = 100

[tenants.acme]
plan = "paid"
concurrent_streams = 5

[prices."*"]
prompt = "0.1"
cached = "0"
completion = "12"

[prices.large]
prompt = "3"
cached = "0.30"
completion = "15.5"
"""
PLANS_PLACE = Path("/etc/lacre/plans.toml")
COUNTS = st.integers(0, 2**31)


def plans(text: str = PLANS) -> Plans:
    return parse_plans(text, PLANS_PLACE)


def test_values_of_plans() -> None:
    found = plans()
    assert found.currency == "EUR"
    assert found.plans["free"].user == PlanLimits(requests_per_minute=10, tokens_per_day=0)
    # Zero is a limit, and one that is absent is none.
    limits = {LimitKind.REQUESTS_PER_MINUTE: 10, LimitKind.TOKENS_PER_DAY: 0}
    assert dict(found.plans["free"].user.each()) == limits
    assert found.plans["free"].tenant == found.plans["free"].everyone == PlanLimits()
    assert found.plans["paid"].tenant == PlanLimits(money_per_month=30_000_001, tokens_per_minute=1000)
    assert found.tenants["acme"].limits == PlanLimits(concurrent_streams=5)
    assert found.price_of("large") == Price(3_000_000, 300_000, 15_500_000)
    assert found.price_of("small") == found.prices["*"]


@pytest.mark.parametrize(
    ("tenant", "named", "plan"),
    [
        ("acme", None, "paid"), ("acme", "free", "free"), ("acme", "gold", None),
        ("else", None, "free"), ("else", "paid", "paid"),
    ],
)  # fmt: skip
def test_whose_plan(tenant: str, named: str | None, plan: str | None) -> None:
    found = plans().plan_of(tenant, named)
    assert (found and found.name) == plan


MAPPED = """
[users]
"acme/alice" = "gold"
"acme/a/b" = "silver"

[groups]
"acme/leads" = "silver"
"acme/engineers" = "paid"
"else/engineers" = "gold"

[plans.gold]
[plans.silver]
"""


@pytest.mark.parametrize(
    ("tenant", "subject", "groups", "named", "plan"),
    [
        ("acme", "alice", ("engineers",), None, "gold"),
        ("acme", "alice", (), "free", "free"),  # the token's comes first
        ("else", "alice", (), None, "free"),  # another tenant's user of that name
        ("acme", "a/b", (), None, "silver"),
        ("acme", "bob", ("engineers", "leads"), None, "silver"),  # the first of the file, not of the token
        ("acme", "bob", ("engineers",), None, "paid"),
        ("else", "bob", ("engineers", "leads"), None, "gold"),
        ("acme", "bob", ("sales",), None, "paid"),  # the tenant's
        ("other", "bob", ("engineers",), None, "free"),  # the default
        ("acme", "alice", ("leads",), "none-such", None),
    ],
)
def test_plans_by_user_and_group(
    tenant: str, subject: str, groups: tuple[str, ...], named: str | None, plan: str | None
) -> None:
    found = plans(PLANS + MAPPED).plan_of(tenant, named, subject, groups)
    assert (found and found.name) == plan


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('[users]\n"alice" = "free"', "write the tenant before the name"),
        ('[users]\n"acme/" = "free"', "write the tenant before the name"),
        ('[groups]\n"a b/c" = "free"', "write the tenant before the name"),
        ('[users]\n"acme/alice" = "gold"', "users.acme/alice: no such plan"),
        ('[groups]\n"acme/leads" = "gold"', "groups.acme/leads: no such plan"),
        ('[groups]\nacme.leads = "free"', "groups"),
    ],
)
def test_mistakes_in_maps_of_plans(table: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        plans(f"{PLANS}\n{table}\n")


@given(prices=st.tuples(COUNTS, COUNTS, COUNTS), fresh=COUNTS, cached=COUNTS, completion=COUNTS)
def test_a_price_is_exact_and_rounded_up_once(prices: tuple[int, int, int], fresh: int, cached: int, completion: int) -> None:
    exact = Fraction(fresh * prices[0] + cached * prices[1] + completion * prices[2], 10**6)
    price = Price(*prices)
    charged = price.of(fresh + cached, cached, completion)
    assert 0 <= charged - exact < 1
    assert charged <= price.at_most(fresh + cached, completion)


@pytest.mark.parametrize(("amount", "text"), [(0, "0.000000"), (1, "0.000001"), (30_000_001, "30.000001"), (-5, "-0.000005")])
def test_money_as_text(amount: int, text: str) -> None:
    assert money(amount) == text


# What is written in place of what; what the error must say.
PLANS_MISTAKES = {
    '"30.000001"': ("30.0", "plans.paid.tenant.money_per_month: write an amount as text"),
    '"0.30"': ('"0.0000001"', "prices.large.cached: write an amount as text, with at most six decimals"),
    '"15.5"': ('"-1"', "prices.large.completion: write an amount"),
    "= 10\n": ("= 1.5\n", "plans.free.user.requests_per_minute: must be a valid integer"),
    "= 1000\n": ("= -1\n", "plans.paid.tenant.tokens_per_minute: must be greater than or equal to 0"),
    "tokens_per_day": (
        "token_per_day",
        "user.token_per_day: unknown key; the nearest known one is 'tokens_per_day'",
    ),
    "[plans.paid.everyone]": ("[plans.paid.all]", "plans.paid.all: unknown key"),
    "default_plan": ("default", "default_plan: missing"),
    'default_plan = "free"': ('default_plan = "fre"', "default_plan: no such plan; write one of free, paid"),
    'plan = "paid"': ('plan = "gold"', "tenants.acme.plan: no such plan"),
    '[prices."*"]': ("[prices.small]", r'add a table \[prices\."\*"\]'),
    '"EUR"': ('"euro"', "currency: must match pattern"),
    "[tenants.acme]": ("[tenants.acme", "not TOML"),
}


@pytest.mark.parametrize("old", PLANS_MISTAKES)
def test_mistakes_in_plans(old: str) -> None:
    new, said = PLANS_MISTAKES[old]
    with pytest.raises(SettingsError, match=rf"^/etc/lacre/plans\.toml: .*{said}") as error:
        plans(PLANS.replace(old, new, 1))
    assert "pydantic" not in str(error.value)


def test_files_of_plans(tmp_path: Path) -> None:
    found = load_plans(shipped())
    assert found.plan_of("anybody", None) is found.plans["standard"]
    with pytest.raises(SettingsError, match="cannot read"):
        load_plans(tmp_path)
