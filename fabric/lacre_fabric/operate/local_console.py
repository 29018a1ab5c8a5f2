"""The operators' console of `lacre up`: on loopback, for `lacre admin open`.

Rules:
- A new settings file gets the tables [admin] and [console]. An existing one without them stays without: a person removed them.
- The port that an earlier start chose stays, as long as no other program has it.
- Everything else in those tables is a person's, and stays.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lacre_fabric.operate import settings_files
from lacre_fabric.operate.nats_server import free_port

_HOST: Final = "127.0.0.1"


def write(settings: Path, wanted: int, *, new: bool) -> str | None:
    """Returns the console's address; None if the gateway has none. Raises SettingsError for a damaged file.

    settings: of the gateway. wanted: its port if that is free; 0: any. new: whether the file was made just now.
    """
    document, _ = settings_files.opened(settings)
    kept = _own_port(document)
    if new or (kept is not None and not _is_free(kept)):
        port = wanted if wanted and _is_free(wanted) else free_port()
        settings_files.update(document, {"admin": {"port": port}, "console": {"url": _url(port)}})
        settings_files.save(settings, document)
    console = document.get("console")
    return str(console["url"]) if isinstance(console, Mapping) and "url" in console else None


def _own_port(document: Mapping[str, Any]) -> int | None:
    """The port that `write` chose; None if a person chose otherwise."""
    admin, console = document.get("admin"), document.get("console")
    if not isinstance(admin, Mapping) or not isinstance(console, Mapping):
        return None
    port = admin.get("port")
    ours = isinstance(port, int) and admin.get("host", _HOST) == _HOST and console.get("url") == _url(port)
    return int(port) if ours and isinstance(port, int) else None


def _url(port: int) -> str:
    return f"http://{_HOST}:{port}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError):  # OverflowError: no port has this number
            return False
    return True
