"""Pools whose workers run no model: each forwards to another server, its upstream (docs/upstream.md)."""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.claims import Members
from lacre.runtime.hosts import is_loopback, without_secrets
from lacre_fabric.operate import settings_files

ALLOWED: Final = ("POST /v1/chat/completions", "POST /v1/completions")
# As the worker's settings accept it: no empty segment, no query, no fragment.
_ROUTE: Final = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) ((?:/[\x21-\x22\x24-\x2e\x30-\x3e\x40-\x7e]+)+|/)")
UPSTREAMS: Final = "upstreams"  # member of `site.json`, by pool


@dataclass(frozen=True, slots=True)
class UpstreamServer:
    """origin: scheme, host and port. allow: the requests that pass, as `METHOD /path`. beyond_loopback: the operator said that
    prompts may leave the worker's host.
    """

    origin: str
    allow: tuple[str, ...] = ALLOWED
    beyond_loopback: bool = False

    def check(self) -> None:
        """Raises SettingsError."""
        shown = f"--upstream {without_secrets(self.origin)}"
        try:
            parts = urlsplit(self.origin)
            plain = self.origin == f"{parts.scheme}://{parts.netloc}" and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            plain = False
        if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"{shown}: write scheme, host and port alone, such as http://127.0.0.1:8000")
        if not self.beyond_loopback and not is_loopback(parts.hostname):
            raise SettingsError(
                f"{shown}: it is not on the worker's own host, so prompts would cross a network; "
                "run the worker on that host, or add --beyond-loopback"
            )
        for route in self.allow:
            if not _ROUTE.fullmatch(route):
                raise SettingsError(f"--allow {route!r}: write a method and a path, such as 'POST /v1/embeddings'")

    @classmethod
    def of(cls, members: Members) -> UpstreamServer:
        """Raises InvalidMessage."""
        beyond = "beyond_loopback" in members and members.flag("beyond_loopback")
        return cls(members.text("origin"), members.texts("allow"), beyond)

    def members(self) -> dict[str, object]:
        return {"origin": self.origin, "allow": list(self.allow), **self._beyond()}

    def table(self, models: Sequence[str]) -> dict[str, object]:
        """`[upstream]` of worker.toml, and of the chart's values."""
        return {"origin": self.origin, **self._beyond(), "models": [self._model(model) for model in models]}

    def put(self, path: Path, document: MutableMapping[str, Any], models: Sequence[str]) -> None:
        """Makes it the upstream of the settings. What a person wrote into the table stays. Raises SettingsError."""
        if "upstream" not in document:
            document["upstream"] = {name: value for name, value in self.table(models).items() if name != "models"}
        table = document["upstream"]
        there = [str(one.get("name")) for one in settings_files.tables(path, table, "models")]
        new = [self._model(model) for model in models if model not in there]
        if new:
            known: list[dict[str, object]] = [{"name": name} for name in there]
            settings_files.set_tables(table, "models", known + new, lambda one, other: one.get("name") == other.get("name"))

    def _beyond(self) -> dict[str, object]:
        return {"beyond_loopback": True} if self.beyond_loopback else {}

    def _model(self, model: str) -> dict[str, object]:
        return {"name": model, "allow": list(self.allow)}


def of_site(folder: Path) -> dict[str, UpstreamServer]:
    """The upstream pools of a state folder. Raises SettingsError."""
    path = folder / "site.json"
    try:
        members = Members.parse(path.read_bytes(), "it")
        said = members.named_objects(UPSTREAMS) if UPSTREAMS in members else {}
        return {pool: UpstreamServer.of(one) for pool, one in said.items()}
    except FileNotFoundError:
        return {}
    except (OSError, InvalidMessage) as exc:
        raise SettingsError(f"{path} is damaged ({exc}): correct its member `{UPSTREAMS}`") from exc
