"""Calls of a gateway's admin API, for the commands of an operator.

Rules:
- The token comes from `LACRE_TOKEN` or a file, never from an argument. It goes over https, or over http to this machine.
- No redirect is followed, and an answer has a maximum size and time.
- A refusal becomes the error of its row of the problem table, with the request id; nothing else of the answer is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx2
from pydantic import ValidationError

from lacre._version import __version__
from lacre.errors import InvalidMessage, RefusedError, SettingsError
from lacre.problems import BY_TYPE, INTERNAL, NO_GATEWAY, Problem, details
from lacre.runtime.authorities import trusting
from lacre.runtime.hosts import without_secrets
from lacre.runtime.json_objects import object_in, parse_object
from lacre.transport.mapped_errors import mapped
from lacre_gateway.admin.reports import Report
from lacre_gateway.admin.worker_problems import DEAF, NO_WORKER, SILENT
from lacre_gateway.http.answers import INVALID
from lacre_gateway.settings import GatewaySettings, fetchable

MAX_ANSWER: Final = 8 * 2**20  # bytes: some 30000 budgets
TIME_LIMIT: Final = 30.0  # seconds: a list of all tenants takes some
_KNOWN: Final = {**BY_TYPE, **{one.type: one for one in (INVALID, DEAF, NO_WORKER, SILENT)}}
_OF_PROXIES: Final = frozenset({502, 503, 504})
_MAX_TOKEN: Final = 16 * 1024  # bytes
T = TypeVar("T", bound=Report)


def address_of(settings: GatewaySettings, file: Path) -> str:
    """Where this gateway serves its admin API. Raises SettingsError."""
    admin = settings.admin
    if admin is None:
        raise SettingsError(
            f"the gateway of {file} serves no admin API: add a table [admin] to it, or name another with --admin"
        )
    if admin.loopback:
        host = f"[{admin.host}]" if ":" in admin.host else admin.host
        return f"http://{host}:{admin.port}"
    # It shares the certificate of the public listener, and so its name.
    host = httpx2.URL(settings.public_url).host
    return f"https://{f'[{host}]' if ':' in host else host}:{admin.port}"


def admin_token(file: Path | None) -> str:
    """An administrator's access token: of the file, or LACRE_TOKEN. Raises SettingsError."""
    from lacre.cli.surroundings import read_file, utf8  # noqa: PLC0415 - commands alone need it

    given = os.environ.get("LACRE_TOKEN", "") if file is None else utf8(read_file(file, _MAX_TOKEN), str(file))
    words = given.split()
    if len(words) != 1 or not words[0].isascii() or not words[0].isprintable():
        source = "LACRE_TOKEN" if file is None else str(file)
        raise SettingsError(f"{source} must hold one access token: of an administrator, whom a rule permits the action")
    return words[0]


class AdminApi:
    """A context manager. url: of the admin listener. ca: the PEM file of its CA; None: the system's CAs."""

    def __init__(self, url: str, token: str, ca: Path | None = None) -> None:
        if not fetchable(url, plain=True) or httpx2.URL(url).query:
            raise SettingsError(
                f"no address of an admin API: {without_secrets(url)}. Write https://HOST:PORT, or http://127.0.0.1:PORT"
            )
        self._client = httpx2.Client(
            base_url=url,
            headers={
                "authorization": f"Bearer {token}", "user-agent": f"lacre/{__version__}", "accept": "application/json",
                "accept-encoding": "identity",
            },
            timeout=TIME_LIMIT,
            follow_redirects=False,
            verify=True if ca is None else trusting(ca, "--ca"),
            trust_env=url.startswith("https:"),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _traceback: TracebackType | None) -> None:
        self._client.close()

    def get(self, path: str, form: type[T]) -> T:
        """form: of the answer. Raises LacreError."""
        return self._call("GET", path, form)

    def post(self, path: str, body: Mapping[str, object], form: type[T]) -> T:
        """form: of the answer. Raises LacreError."""
        return self._call("POST", path, form, json=body)

    def _call(self, method: str, path: str, form: type[T], **content: Any) -> T:
        with mapped("the admin API", "--admin"), self._client.stream(method, path, **content) as response:
            document = bytearray()
            for piece in response.iter_raw():
                document += piece
                if len(document) > MAX_ANSWER:
                    raise InvalidMessage(f"the answer of the admin API is over {MAX_ANSWER} bytes: check --admin")
        if response.is_success:
            try:
                return form.model_validate(parse_object(document, "the answer of the admin API"))
            except ValidationError as exc:
                raise InvalidMessage("the answer of the admin API has another form: use its version of lacre") from exc
        raise _refused(response, bytes(document))


def _refused(response: httpx2.Response, document: bytes) -> RefusedError:
    said = details.read(document)
    later = response.headers.get("retry-after", "")
    refused = _problem(response.status_code, document).exception(
        float(later) if later.isdecimal() and len(later) < len("100000") else None, said
    )
    request_id = said.get("request_id")
    refused.request_id = request_id if isinstance(request_id, str) else None
    return refused


def _problem(status: int, document: bytes) -> Problem:
    """As the document names it, or else one of this status."""
    named = _KNOWN.get(str((object_in(document) or {}).get("type")))
    if named is not None:
        return named
    if status in _OF_PROXIES:
        return NO_GATEWAY
    return next((problem for problem in _KNOWN.values() if problem.status == status), INTERNAL)
