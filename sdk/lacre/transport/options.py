"""The options of a sealed client, beside its connection string: for code that makes clients and passes the options on.

A test compares them with the parameters of `lacre.Client` and `lacre.AsyncClient`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import httpx2

from lacre.evidence.prices import Prices
from lacre.jose.dpop import ProofKey
from lacre.transport.dial import Verify
from lacre.transport.oauth import AsyncToken, Token
from lacre.trust.manifest_store import Memory
from lacre.wire.header import Kem
from lacre.wire.padding import Shape


class SharedOptions(TypedDict, total=False):
    """Like the parameters of `lacre.Client` with the same names."""

    dpop: ProofKey | None
    pool: str
    kem: Kem | Sequence[Kem]
    shape: Shape
    keep_identifying_fields: bool
    pin_models: Mapping[str, str] | None
    retries: int | None
    resume: int
    max_concurrency: int | None
    cache_scope: str | None
    affinity: bool
    prices: Prices | None
    memory: Memory | None
    verify: Verify
    proxy: httpx2.Proxy | httpx2.URL | str | None
    limits: httpx2.Limits


class Options(SharedOptions, total=False):
    """Of a sync client. transport: of the connection to the gateway."""

    token: Token | None
    transport: httpx2.BaseTransport | None


class AsyncOptions(SharedOptions, total=False):
    """Of an async client. transport: of the connection to the gateway."""

    token: AsyncToken | None
    transport: httpx2.AsyncBaseTransport | None
