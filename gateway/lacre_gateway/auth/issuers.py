"""The issuers of the settings, each with its source of keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from lacre.errors import SettingsError
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


async def prepared(
    issuers: Sequence[Issuer], before: Sequence[Issuer], known: Sequence[TrustedIssuer], log: Log, undo: AsyncExitStack
) -> list[TrustedIssuer]:
    """The issuers of new settings. before, known: the tables of the present settings, and their issuers, in order.

    Unchanged ones keep their keys. Keys of new ones are read or fetched here, so that no request waits for them. undo: gets
    what must be closed if they are not used. Raises SettingsError.
    """
    kept = {_source(table): one.keys for table, one in zip(before, known, strict=True)}
    found = []
    for number, (table, fresh) in enumerate(zip(issuers, trusted(issuers, log), strict=True)):
        keys, new = kept.get(_source(table)), fresh.keys
        if isinstance(keys, RemoteKeys) or (isinstance(keys, KeySet) and keys == new):
            found.append(replace(fresh, keys=keys))
            continue
        if isinstance(new, RemoteKeys):
            undo.push_async_callback(new.close)
            if fault := await new.fetched():
                raise SettingsError(f"issuers.{number}: the keys of {fresh.issuer} cannot be fetched: {fault}")
        found.append(fresh)
    return found


def _source(issuer: Issuer) -> tuple[object, ...]:
    """Where its keys come from, and how they are read."""
    jwks = None if issuer.jwks is None else str(issuer.jwks)
    return issuer.issuer, jwks, issuer.jwks_url, issuer.algorithms, issuer.ca, issuer.stale_limit
