"""Checks what the gateway trusts and decides by: its key, the issuers, the rules."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Final

from lacre.errors import LacreError, SettingsError
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.logs import make_log
from lacre_fabric.nats.roles import Credential
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.jwks_remote import RemoteKeys
from lacre_gateway.doctor.findings import Findings
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.policy.rules import RuleSet
from lacre_gateway.policy.trial import try_out
from lacre_gateway.settings import GatewaySettings, Issuer, shipped

_ISSUER_LIMIT: Final = 10.0  # seconds that an issuer has to answer


def check(settings: GatewaySettings, findings: Findings) -> None:
    for name, read in (("signing_key", read_ed25519), ("nats.credentials", Credential.load)):
        path = settings.signing_key if name == "signing_key" else settings.nats.credentials
        try:
            read(path)
        except SettingsError as exc:
            findings.failed(name, str(exc), "put the file there, readable only for the gateway's user")
        else:
            findings.ok(name, str(path))
    _rules(settings, findings)


def _rules(settings: GatewaySettings, findings: Findings) -> None:
    folder = settings.policies or shipped()
    try:
        asyncio.run(try_out(folder))  # in its own process, because a set can end the process that parses it
        rules = RuleSet.load(folder)
    except PolicyError as exc:
        findings.failed("policies", str(exc), "correct the file; `lacre policy check` and `lacre policy test` say more")
    else:
        told = f"{folder}: {len(rules.policies.names)} policies hold in {len(rules.cases)} cases"
        findings.ok("policies", told)


async def check_issuers(settings: GatewaySettings, findings: Findings) -> None:
    for number, issuer in enumerate(settings.issuers):
        await _issuer(issuer, f"issuers.{number}", findings)


async def _issuer(issuer: Issuer, place: str, findings: Findings) -> None:
    log = io.StringIO()
    try:
        [found] = trusted([issuer], make_log(log))
    except LacreError as exc:
        findings.failed(place, str(exc), f"correct {place}.{'jwks' if issuer.ca is None else 'ca'}")
        return
    keys = found.keys
    if not isinstance(keys, RemoteKeys):
        findings.ok(place, f"{issuer.issuer}: its keys are in the settings; {_tenancy(issuer)}")
        return
    keys.start()
    try:
        deadline = time.monotonic() + _ISSUER_LIMIT
        while not keys.usable and time.monotonic() < deadline and not log.getvalue():
            await asyncio.sleep(0.05)
    finally:
        await keys.close()
    if keys.usable:
        findings.ok(place, f"{issuer.issuer}: its keys were fetched; {_tenancy(issuer)}")
    else:
        remedy = (
            "check that this machine reaches the issuer by https, that its certificate is valid, and that it publishes keys"
        )
        findings.failed(place, f"{issuer.issuer}: {_reason(log.getvalue())}", remedy)


def _tenancy(issuer: Issuer) -> str:
    """The tenant of the issuer's tokens. A real issuer's token may have no such claim, and is then refused."""
    if issuer.tenant is not None:
        return f"its tokens are for the tenant {issuer.tenant}"
    otherwise = "are refused" if issuer.default_tenant is None else f"speak for {issuer.default_tenant}"
    return f"its tokens name their tenant in {'.'.join(issuer.claims.tenant)}, and those that do not {otherwise}"


def _reason(log: str) -> str:
    """The reason in the last line of a log."""
    lines = log.splitlines()
    said = json.loads(lines[-1]) if lines else {}
    return str(said.get("reason") or said.get("event") or f"no answer within {_ISSUER_LIMIT:.0f} s")
