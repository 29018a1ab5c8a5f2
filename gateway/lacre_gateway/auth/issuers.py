"""The issuers of the settings, each with its source of keys."""

from __future__ import annotations

from collections.abc import Sequence

from lacre_fabric.logs import Log
from lacre_gateway.auth.claims import ClaimNames
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.auth.jwks_remote import RemoteKeys, Timing
from lacre_gateway.auth.tokens import TrustedIssuer
from lacre_gateway.settings import Issuer


def trusted(issuers: Sequence[Issuer], log: Log) -> list[TrustedIssuer]:
    """Reads key sets from files; the others are fetched after the start. Raises SettingsError."""
    return [
        TrustedIssuer(
            issuer=issuer.issuer,
            audience=issuer.audience,
            keys=_keys(issuer, f"issuers.{number}", log),
            algorithms=issuer.algorithms,
            tenant=issuer.tenant,
            leeway=issuer.leeway,
            lifetime=issuer.token_lifetime,
            names=ClaimNames(
                **issuer.claims.model_dump(),
                default_tenant=issuer.default_tenant,
                elsewhere=issuer.claims_elsewhere == "ignore",
            ),
        )
        for number, issuer in enumerate(issuers)
    ]


def _keys(issuer: Issuer, place: str, log: Log) -> KeySet | RemoteKeys:
    if issuer.jwks is not None:
        keys = KeySet.read(issuer.jwks, issuer.algorithms, f"{place}.jwks")
        for reason in keys.passed_over:
            log.warning("issuer keys ignored", issuer=issuer.issuer, reason=reason)
        return keys
    timing = Timing(stale_limit=issuer.stale_limit)
    return RemoteKeys(issuer.issuer, issuer.jwks_url, issuer.algorithms, place=place, log=log, timing=timing, ca=issuer.ca)
