"""The settings file: what it means, and an error for every mistake that names the key and the remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from lacre.errors import SettingsError
from lacre_gateway.settings import GatewaySettings, Issuer, load, parse

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


def settings(text: str = TEXT) -> GatewaySettings:
    return parse(text, PLACE)


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


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        settings().gateway = "g2"  # type: ignore[misc]
    assert not dataclasses.is_dataclass(settings())


def test_key_set_in_the_file() -> None:
    found = settings(TEXT.replace('jwks = "jwks.json"', 'jwks = { keys = [{ kty = "OKP" }] }'))
    assert found.issuers[0].jwks == {"keys": [{"kty": "OKP"}]}


# What is written in place of what; what the error must say.
MISTAKES = {
    'audit = "': ('audti = "', ["audti: unknown key", "'audit'", "audit: missing"]),
    "concurrent_per_subject": (
        "concurent_per_subject",
        ["limits.concurent_per_subject: unknown key", "'concurrent_per_subject'"],
    ),
    "audience =": ("audiense =", ["issuers.0.audiense: unknown key", "'audience'", "issuers.0.audience: missing"]),
    "context = ": ("contxt = ", ["models.smollm2-135m.contxt: unknown key", "'context'"]),
    "[limits]": ("[limit]", ["limit: unknown key", "'limits'"]),
    '"g1"': ('"g1.*"', ["gateway: must match pattern"]),
    '"https://gateway.example/"': ('"gateway"', ["public_url: write an address such as https://"]),
    "AAAA": ("AA", ["trust: copy the whole root key"]),
    '"nats://127.0.0.1:4222"': ('"nats://user:s3cret@h:1"', ["nats.url: ", "nats.credentials"]),
    '"EdDSA", "PS256"': ('"HS256"', ["issuers.0.algorithms.0: must be 'EdDSA'"]),
    '["EdDSA", "PS256"]': ("[]", ["issuers.0.algorithms: needs at least one entry"]),
    '"jwks.json"': ("3", ["issuers.0.jwks: write the path of a JWKS file"]),
    "concurrent_per_subject = 100": ("concurrent_per_subject = 0", ["limits.concurrent_per_subject: must be greater than 0"]),
    "= 100": ("= 100\nqueue_limit = 31", ["limits.queue_limit: must be less than or equal to 30"]),
    "context = 2048": ('context = "many"', ["models.smollm2-135m.context: must be a valid integer"]),
    "[nats]": ("[nats", ["not TOML"]),
}


@pytest.mark.parametrize("old", MISTAKES)
def test_mistakes(old: str) -> None:
    new, said = MISTAKES[old]
    with pytest.raises(SettingsError) as error:
        settings(TEXT.replace(old, new, 1))
    message = str(error.value)
    assert message.startswith("/etc/lacre/gateway.toml: ")
    for part in said:
        assert part in message
    assert "s3cret" not in message and "pydantic" not in message and "Tuple" not in message


def test_grants_must_outlive_the_queue() -> None:
    with pytest.raises(SettingsError, match=r"limits\.grant_lifetime must exceed limits\.queue_limit by 10 s"):
        settings(TEXT.replace("concurrent_per_subject = 100", "grant_lifetime = 35.0"))


def test_an_issuer_once() -> None:
    block = TEXT[TEXT.index("[[issuers]]") : TEXT.index("[limits]")]
    with pytest.raises(SettingsError, match="each issuer may appear once"):
        settings(TEXT.replace("[limits]", f"{block}\n[limits]"))


def test_where_an_issuer_s_keys_are() -> None:
    found = parse(TEXT.replace('jwks = "jwks.json"', ""), PLACE).issuers[0]
    assert (found.jwks, found.jwks_url) == (None, None)  # discovery
    found = parse(TEXT.replace('jwks = "jwks.json"', 'jwks_url = "https://keys.example/set"'), PLACE).issuers[0]
    assert (found.jwks, found.jwks_url) == (None, "https://keys.example/set")
    for url in ("http://keys.example/set", "keys.json", "https://user@keys.example/", "file:///etc/passwd"):
        with pytest.raises(SettingsError, match=r"issuers.0.jwks_url: write the https address"):
            parse(TEXT.replace('jwks = "jwks.json"', f'jwks_url = "{url}"'), PLACE)
    with pytest.raises(SettingsError, match="in one place"):
        parse(TEXT.replace('jwks = "jwks.json"', 'jwks = "jwks.json"\njwks_url = "https://keys.example/set"'), PLACE)


@pytest.mark.parametrize("issuer", ["urn:issuer", "http://issuer.example", "issuer.example"])
def test_discovery_needs_an_address(issuer: str) -> None:
    text = re.sub(r'issuer = ".*"', f'issuer = "{issuer}"', TEXT)
    assert parse(text, PLACE).issuers[0].issuer == issuer
    with pytest.raises(SettingsError, match="must have an https address"):
        parse(text.replace('jwks = "jwks.json"', ""), PLACE)


def test_names_of_claims() -> None:
    claims = 'groups = "realm_access.roles"\ntenant = ["https://example.com/tenant"]\nscopes = "permissions"'
    found = parse(TEXT.replace("[limits]", f"[issuers.claims]\n{claims}\n[limits]"), PLACE).issuers[0].claims
    assert found.groups == ("realm_access", "roles")
    assert found.tenant == ("https://example.com/tenant",)
    assert (found.scopes, found.plan) == (("permissions",), ("plan",))
    for wrong in ('groups = ""', "groups = []", "groups = 3", 'groups = "a..b"', 'groups = ["a", 3]'):
        with pytest.raises(SettingsError, match=r"issuers.0.claims.groups: write the claim's name"):
            parse(TEXT.replace("[limits]", f"[issuers.claims]\n{wrong}\n[limits]"), PLACE)


def test_a_url_is_one_claim_s_name() -> None:
    claims = 'groups = "https://my.app.example.com/roles"'
    found = parse(TEXT.replace("[limits]", f"[issuers.claims]\n{claims}\n[limits]"), PLACE).issuers[0].claims
    assert found.groups == ("https://my.app.example.com/roles",)


def test_a_token_without_a_tenant_needs_the_settings_word() -> None:
    def issuer(more: str) -> Issuer:
        return parse(TEXT.replace('jwks = "jwks.json"', f'jwks = "jwks.json"\n{more}'), PLACE).issuers[0]

    assert (issuer("").default_tenant, issuer("").claims_elsewhere) == (None, "refuse")
    assert issuer('default_tenant = "default"').default_tenant == "default"
    assert issuer('claims_elsewhere = "ignore"').claims_elsewhere == "ignore"
    with pytest.raises(SettingsError, match="remove `default_tenant`"):
        issuer('tenant = "acme"\ndefault_tenant = "acme"')
    for wrong in ('default_tenant = ""', 'default_tenant = "a/b"', 'claims_elsewhere = "ask"'):
        with pytest.raises(SettingsError, match=r"issuers.0.(default_tenant|claims_elsewhere)"):
            issuer(wrong)


def test_no_issuer() -> None:
    block = TEXT[TEXT.index("[[issuers]]") : TEXT.index("[limits]")]
    with pytest.raises(SettingsError, match="issuers: missing"):
        settings(TEXT.replace(block, ""))


def test_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'gateway = "\xe9"')
    with pytest.raises(SettingsError, match="UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "good.toml").write_text(TEXT)
    assert load(tmp_path / "good.toml").signing_key == tmp_path / "grant.pem"


def test_an_instance_differs_by_its_name_alone() -> None:
    whole = settings(TEXT)
    third = whole.as_instance(3)
    assert (third.instance, third.gateway) == (f"{whole.gateway}__3", whole.gateway)
    assert (third.audit, third.listen, third.admin, third.shared) == (whole.audit, whole.listen, whole.admin, False)
    assert third.audit_origin != whole.as_instance(2).audit_origin
    assert whole.for_process(3, 1).shared


@pytest.mark.parametrize("number", [-1, 16])
def test_an_instance_that_the_credential_is_not_for(number: int) -> None:
    with pytest.raises(SettingsError, match="16 instances"):
        settings(TEXT).as_instance(number)


def test_instances_have_one_process_each() -> None:
    with pytest.raises(SettingsError, match="processes"):
        settings("processes = 2\n" + TEXT).as_instance(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.replace("g1", "é").encode("latin-1"), "must be UTF-8"),
        (b"a = " + b"[" * 5000, "nested too deep"),
        (TEXT.replace("grant.pem", "a\\u0000b").encode(), "no null character"),
        (TEXT.replace("grant.pem", "~nobody-of-this-name/x").encode(), "no such home folder"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        load(path)


def test_a_file_without_end() -> None:
    with pytest.raises(SettingsError, match="not a settings file"):
        load(Path("/dev/zero"))


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load(path).gateway == "g1"
