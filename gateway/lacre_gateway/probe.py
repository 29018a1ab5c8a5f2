"""`python -m lacre_gateway.probe --settings FILE [--ready]`: asks the gateway on this machine, without an HTTP client.

Without `--ready` it asks whether the process runs: use it to restart a container. With it, it asks whether requests can be
served: use it to route traffic. If a message server is away, every gateway is unready but healthy, because a restart would not
help.
"""

from __future__ import annotations

import argparse
import http.client
import ssl
import sys
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_gateway.settings import Listen, load

ANSWER: Final = 3.0  # seconds; shorter than any prober's own limit
_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - keys to look up, not to bind


def ask(listen: Listen, path: str) -> str | None:
    """None if it says yes; otherwise the fault in a few words that hold nothing of the answer."""
    connection = _connection(listen)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer ({type(exc).__name__})"
    finally:
        connection.close()
    return None if status == http.client.OK else f"{path} says {status}"


def _connection(listen: Listen) -> http.client.HTTPConnection:
    host = _ANYWHERE.get(listen.host, listen.host)
    if listen.tls is None:
        return http.client.HTTPConnection(host, listen.port, timeout=ANSWER)
    # The certificate is for the name that clients use, and nothing secret is sent: `lacre doctor` checks certificates.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, listen.port, timeout=ANSWER, context=context)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 for yes, 1 for no, with a line on stderr that says why."""
    parser = argparse.ArgumentParser(
        prog="lacre_gateway.probe", description="Ask whether the gateway on this machine is healthy."
    )
    parser.add_argument("--settings", type=Path, required=True, help="the gateway's settings file")
    parser.add_argument("--ready", action="store_true", help="ask whether requests can be served")
    chosen = parser.parse_args(arguments)
    try:
        wrong = ask(load(chosen.settings).listen, "/readyz" if chosen.ready else "/healthz")
    except SettingsError as exc:
        wrong = str(exc)
    if wrong is not None:
        print(wrong, file=sys.stderr)  # noqa: T201 - the one line that says why
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
