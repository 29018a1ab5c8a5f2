"""The defaults of a gateway's clients, and the reading of their arguments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any, Final

import httpx2

from lacre._version import __version__
from lacre.errors import SettingsError, UsageError
from lacre.exchange.call import ORIGIN
from lacre.exchange.request import Overrides
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.trust.manifest import is_digest
from lacre.trust.manifest_store import Memory, VersionFile

BASE_URL: Final = f"{ORIGIN}/v1"

# Reading waits for the queue (30 s) and a long prompt's prefill; the other steps are quick.
DEFAULT_TIMEOUT: Final = httpx2.Timeout(10.0, read=120.0, write=60.0, pool=120.0)

# During a long answer, a gateway may restart twice and a connection may break. A possible end of a worker is counted
# separately, and the answer resumed once after it (`lacre.exchange.retry`).
DEFAULT_RESUMES: Final = 3

EventHooks = Mapping[str, list[Any]]
OUTER_HEADERS: Final = {"user-agent": f"lacre/{__version__}"}


def memory_of(given: Memory | None) -> Memory:
    if given is None:
        return VersionFile.default()
    if isinstance(given, type) or not callable(getattr(given, "update", None)):
        raise UsageError("memory must be a lacre.VersionMemory(), a lacre.VersionFile or another object with `update`")
    return given


def at_once_of(given: int | None) -> int | None:
    return None if given is None else arguments.count(given, "max_concurrency", least=1)


def overrides_of(
    *,
    retries: int | EllipsisType | None = ...,
    model: str | None = None,
    pool: str | None = None,
    cache_scope: str | None = None,
) -> Overrides:
    """Raises UsageError."""
    for name, value in (("model", model), ("pool", pool), ("cache_scope", cache_scope)):
        if value is not None:
            arguments.unicode_text(arguments.text(value, name), name)
    if retries is not None and not isinstance(retries, EllipsisType):
        arguments.count(retries, "retries")
    return Overrides(pool=pool, model=model, cache_scope=cache_scope, retries=retries)


def proof_key_of(given: ProofKey | None) -> ProofKey | None:
    if given is None:
        path = os.environ.get("LACRE_DPOP_KEY")
        return ProofKey.load(path) if path else None
    if not isinstance(given, ProofKey):
        raise UsageError(f"dpop must be a lacre.ProofKey, not {arguments.kind_of(given)}: use lacre.ProofKey.load(path)")
    return given


def pin_models_of(given: Mapping[str, str] | None) -> dict[str, str]:
    if given is None:
        return pins_from(os.environ.get("LACRE_PIN_MODELS", "").replace(",", " ").split(), "LACRE_PIN_MODELS")
    if not isinstance(given, Mapping):
        raise UsageError(f"pin_models must be a dict from model names to digests, not {arguments.kind_of(given)}")
    for name, pin in given.items():
        if not isinstance(name, str) or not isinstance(pin, str) or not is_digest(pin):
            raise UsageError(
                f"pin_models[{name!r}] must be `sha256:` and 64 hexadecimal digits in small letters, as `lacre model inspect "
                "FILE` prints the digest"
            )
    return dict(given)


def pins_from(texts: Iterable[str], source: str) -> dict[str, str]:
    """texts: `NAME=sha256:HEX`. source: where they come from, for errors. Raises SettingsError."""
    pins: dict[str, str] = {}
    for text in texts:
        name, _, digest = text.rpartition("=")
        if not name or not is_digest(digest):
            raise SettingsError(
                f"{source} has {text[:200]!r}; give NAME=sha256: and 64 hexadecimal digits in small letters, as "
                "`lacre model inspect FILE` prints the digest"
            )
        if pins.setdefault(name, digest) != digest:
            raise SettingsError(f"{source} pins two files for the model {name!r}: give one")
    return pins
