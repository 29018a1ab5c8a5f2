"""Broken tokens, each with its reason: the gateway's log and `lacre token check` give the same one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
import typer
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from lacre import ProofKey
from lacre.errors import SettingsError
from lacre.jose.jws import b64u
from lacre_fabric.operate.commands import token_app
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.auth.tokens import MAX_TOKEN
from lacre_gateway.commands import register
from lacre_gateway.doctor.token import KnownByFabric, TokenReport, explain
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.stage import Stage

DAY = 86400


def now() -> int:
    return int(time.time())


def resigned(
    issuer: Issuer, header: dict[str, Any], payload: bytes | None = None, sign: Callable[[bytes], bytes] | None = None
) -> str:
    said = f"{b64u(json.dumps(header).encode())}.{b64u(payload or json.dumps(issuer.claims()).encode())}"
    return f"{said}.{b64u((sign or issuer.ed.sign)(said.encode()))}"


def twice(issuer: Issuer) -> str:
    return resigned(issuer, {"alg": "EdDSA", "kid": "ed"}, b'{"sub":"mallory",' + json.dumps(issuer.claims()).encode()[1:])


def edited(issuer: Issuer) -> str:
    head, payload, signature = issuer.token().split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "==")) | {"sub": "mallory"}
    return f"{head}.{b64u(json.dumps(said).encode())}.{signature}"


# What is wrong with the token, how it is made, its reason, and whether the issuer's signature holds (None: nobody looked).
BROKEN: dict[str, tuple[Callable[[Issuer], str], str, bool | None]] = {
    "expired": (lambda issuer: issuer.token(exp=now() - 60), "exp: expired", True),
    "not valid yet": (lambda issuer: issuer.token(nbf=now() + 600), "nbf: not-yet-valid", True),
    "issued in the future": (lambda issuer: issuer.token(iat=now() + 600, exp=now() + 900), "iat: not-yet-valid", True),
    "lives too long": (lambda issuer: issuer.token(exp=now() + 60 * DAY), "exp: lives-too-long", True),
    "no expiry": (lambda issuer: issuer.token(drop="exp"), "exp: missing", True),
    "for another audience": (lambda issuer: issuer.token(aud="another"), "aud: for-another-audience", True),
    "of another issuer": (lambda issuer: issuer.token(iss="https://other.example"), "iss: not in the settings", None),
    "of no issuer": (lambda issuer: issuer.token(drop="iss"), "iss: missing", None),
    "unknown key": (lambda issuer: issuer.token(headers={"kid": "nobody"}), "kid: not among this issuer's keys", None),
    "algorithm not pinned": (
        lambda issuer: jwt.encode(issuer.claims(), issuer.rsa, "RS512", {"kid": "rsa"}),
        "alg: not among this issuer's algorithms", None,
    ),
    "signed with the public key": (
        lambda issuer: resigned(
            issuer, {"alg": "HS256", "kid": "ed"},
            sign=lambda said: hmac.digest(issuer.ed.public_key().public_bytes_raw(), said, hashlib.sha256),
        ),
        "alg: not among this issuer's algorithms", None,
    ),
    "algorithm none": (
        lambda issuer: resigned(issuer, {"alg": "none"}, sign=lambda _said: b""), "authorization: not a JWT", None,
    ),
    "signed by a stranger": (
        lambda issuer: resigned(issuer, {"alg": "EdDSA", "kid": "ed"}, sign=Ed25519PrivateKey.generate().sign),
        "signature: not by this issuer's key", False,
    ),
    "edited": (edited, "signature: not by this issuer's key", False),
    "no subject": (lambda issuer: issuer.token(drop="sub"), "sub: missing", True),
    "groups that are no list": (lambda issuer: issuer.token(groups={"staff": True}), "groups: malformed", True),
    "too many groups": (lambda issuer: issuer.token(groups=[str(i) for i in range(257)]), "groups: too-many", True),
    "groups elsewhere": (
        lambda issuer: issuer.token(_claim_names={"groups": "src1"}, _claim_sources={"src1": {}}), "groups: elsewhere", True,
    ),
    "no tenant": (lambda issuer: issuer.token(drop="tenant"), "tenant: missing", True),
    "bound to a certificate": (
        lambda issuer: issuer.token(cnf={"x5t#S256": "A" * 43}), "cnf: bound-in-another-way", True,
    ),
    "revoked": (lambda issuer: issuer.token(jti="stolen"), "token: revoked", True),
    "a logout token": (lambda issuer: issuer.token(headers={"typ": "logout+jwt"}), "typ: not an access token", None),
    "a critical extension": (
        lambda issuer: resigned(issuer, {"alg": "EdDSA", "kid": "ed", "crit": ["x"], "x": 1}), "crit: not understood", None,
    ),
    "a member twice": (twice, "form: not two JSON objects and a signature, or a member appears twice", None),
    "too large": (lambda issuer: issuer.token(groups=["g" * 200] * 100), f"size: over {MAX_TOKEN} bytes", None),
    "not a JWT": (lambda _issuer: "open-sesame", "authorization: not a JWT", None),
}  # fmt: skip


async def checked(stage: Stage, token: str, fabric: KnownByFabric | None = None) -> TokenReport:
    known = fabric or KnownByFabric(stage.gateway.feed.manifest, list(stage.gateway.revocations))
    return await explain(stage.gateway.settings, token, known, address="192.0.2.1")


@pytest.mark.parametrize("name", BROKEN)
async def test_the_log_and_the_command_give_the_same_reason(name: str, stage: Stage, client: httpx2.AsyncClient) -> None:
    make, reason, genuine = BROKEN[name]
    token = make(stage.issuer)
    await stage.gateway.revoke(jti="stolen")
    response = await stage.post(client, token)
    line = stage.logged()[-1]
    assert (response.status_code, line["status"], line["reason"]) == (401, 401, reason)
    report = await checked(stage, token)
    assert (report.accepted, report.reason, report.problem, report.genuine) == (False, reason, line["problem"], genuine)
    assert report.remedy and report.may == () and report.principal is None
    signature = token.rpartition(".")[2]
    assert not signature or (signature not in stage.log.getvalue() and signature not in repr(report))


async def test_what_a_good_token_may_do(stage: Stage) -> None:
    report = await checked(stage, stage.issuer.token(groups=["staff", "admins"], scope="lacre:explain", plan=None))
    assert (report.accepted, report.genuine, report.reason, report.unchecked) == (True, True, "", ())
    assert report.header == {"alg": "EdDSA", "kid": "ed", "typ": "JWT"}
    assert report.claims["groups"] == ["staff", "admins"] and report.claims["aud"] == AUDIENCE
    who = report.principal
    assert who is not None
    assert (who.issuer, who.tenant, who.subject, who.groups) == (ISSUER, "acme", "alice", ("admins", "staff"))
    assert report.expires_at is not None and 500 < report.expires_at - time.time() < 700
    may = {(each.action, each.target): each.most for each in report.may}
    assert may["chat", "default/smollm2-135m"] == 32768
    assert ("explain", "default/smollm2-135m") in may
    assert not {action for action, _ in may if action == "http" or action.startswith("admin:")}
    assert report.limits  # of the plan that ships


async def test_a_bound_token_needs_a_proof_only_with_a_request(stage: Stage, client: httpx2.AsyncClient) -> None:
    token = stage.issuer.token(cnf={"jkt": ProofKey.generate().thumbprint})
    assert (await stage.post(client, token)).status_code == 401
    assert stage.logged()[-1]["reason"] == "proof: a token that is bound to a key needs the scheme DPoP"
    report = await checked(stage, token)
    assert (report.accepted, report.bound) == (True, True)


async def test_without_nats_it_says_what_it_does_not_know(stage: Stage) -> None:
    await stage.gateway.revoke(jti="stolen")
    report = await checked(stage, stage.issuer.token(jti="stolen"), KnownByFabric(unchecked=["whether it is revoked: no NATS"]))
    assert (report.accepted, report.may, report.unchecked) == (True, (), ("whether it is revoked: no NATS",))


# The command


@pytest.fixture
def settings(issuer: Issuer, tmp_path: Path) -> Path:
    """The folder of a gateway's settings, whose NATS does not run."""
    (tmp_path / "jwks.json").write_text(json.dumps(issuer.jwks()))
    (tmp_path / "gateway.toml").write_text(Stage().settings_text())
    return tmp_path


def run(folder: Path, token: str, *options: str, given: str = "-", **env: str) -> Result:
    register(typer.Typer())
    arguments = ["check", *([given] if given else []), "--settings", str(folder / "gateway.toml"), *options]
    return CliRunner().invoke(token_app, arguments, input=token, env={"LACRE_TOKEN": "", **env})


def in_json(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_where_the_command_finds_the_token(settings: Path, issuer: Issuer) -> None:
    token = issuer.token()
    (settings / "token").write_text(f"Bearer {token}\n")
    ways = {
        "stdin": run(settings, token + "\n", "--json"),
        "file": run(settings, "", "--file", str(settings / "token"), "--json", given=""),
        "variable": run(settings, "", "--json", given="", LACRE_TOKEN=token),
        "argument": run(settings, "", "--json", given=token),
    }
    for way, result in ways.items():
        told = in_json(result, 0)
        assert told["accepted"] and told["principal"]["subject"] == "alice", way
        assert ("other users can read a token" in result.stderr) == (way == "argument")
        assert "whether it is revoked" in told["unchecked"][0]
    for nothing in (run(settings, ""), run(settings, "a b"), run(settings, "", "--file", str(settings / "none"), given="")):
        assert isinstance(nothing.exception, SettingsError)


def test_the_command_for_people(settings: Path, issuer: Issuer) -> None:
    refused = run(settings, issuer.token(aud="another\x1b[2J", groups=["g"] * 200))
    assert refused.exit_code == 3
    assert refused.stdout.startswith("refused: aud: for-another-audience\n")
    assert f"the audience {AUDIENCE}" in refused.stdout and "\x1b" not in refused.stdout
    accepted = run(settings, issuer.token())
    assert (accepted.exit_code, accepted.stdout.splitlines()[0]) == (0, "accepted")
    assert "acme" in accepted.stdout


def test_an_issuer_that_does_not_answer(settings: Path, issuer: Issuer) -> None:
    address = f"http://127.0.0.1:{free_port()}/keys"
    text = (settings / "gateway.toml").read_text().replace('jwks = "jwks.json"', f'jwks_url = "{address}"')
    (settings / "gateway.toml").write_text(text)
    told = in_json(run(settings, issuer.token(), "--json"), 3)
    assert told["problem"] == "issuer-unavailable"
    assert told["reason"].startswith(f"the issuer's keys cannot be fetched: {address} cannot be reached")
