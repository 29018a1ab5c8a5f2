"""The address of a key: parsed once, and rejected if it contains a secret.

Addresses appear in settings files, on command lines and in logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from lacre.errors import SettingsError
from lacre.runtime import folders
from lacre.runtime.hosts import is_loopback

_SECRET: Final = (
    "pin",
    "pin-value",
    "password",
    "secret",
    "token",
)  # options where people might write a secret; a token's *label* is in the path


@dataclass(frozen=True, slots=True)
class Address:
    """scheme:[//host[:port]]path[?options]. path: decoded, without its leading slash if there is a host."""

    scheme: str
    host: str
    port: int | None
    path: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SettingsError, which does not repeat the text because it may contain a secret."""
        try:
            parts = urlsplit(text)
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            host, port = parts.hostname or "", parts.port
        except ValueError as exc:
            raise SettingsError("not a valid KMS address; see docs/kms.md for an example of each kind") from exc
        if parts.username is not None or parts.password is not None or any(name.lower() in _SECRET for name in options):
            raise SettingsError("remove the secret from the key's address: put it in a file of mode 0600 (docs/kms.md)")
        path = parts.path if parts.scheme == "pkcs11" else unquote(parts.path)  # pkcs11 decodes each part by itself
        return cls(parts.scheme, host, port, path, options)

    def only(self, *known: str) -> None:
        """Raises SettingsError for any other option: a misspelt option would have no effect."""
        for name in self.options:
            if name not in known:
                raise SettingsError(f"{self.scheme}: has no option {name!r}; it has {', '.join(known) or 'none'}")

    def file(self, option: str) -> Path | None:
        """The path in an option that names a file."""
        if option not in self.options:
            return None
        path = folders.expanded(Path(self.options[option].removeprefix("file:")))
        if not path.is_absolute():
            raise SettingsError(f"{self.scheme}: {option} must be an absolute path of a file")
        return path

    @property
    def origin(self) -> str:
        """The URL of an HTTP service: with TLS, except on loopback."""
        port = "" if self.port is None else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if is_loopback(self.host) else 'https'}://{host}{port}"


def endpoint(text: str) -> str:
    """An option with a service's URL. Raises SettingsError unless it uses TLS or loopback."""
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.username is not None:
        raise SettingsError("take user and password out of the endpoint: it is no place for a secret")
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return text.rstrip("/")
    raise SettingsError("an endpoint must begin with https://, or with http:// for this machine")
