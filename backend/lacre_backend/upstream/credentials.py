"""The worker's own credentials at the upstream: headers that every request gets, each from a file.

Rules:
- A value is in its file, in this process's memory, and in requests to the upstream. It is in no setting, log, error or `repr`.
- The file is refused if other users can read it, as every file with a secret (`lacre_fabric.keys.secret_files`).
- A changed file is read again. If it cannot be used then, the last value stays, and the fault is logged once.
- A client's header of the same name is not forwarded: the settings refuse such a name in `headers`. So no client can replace a
  credential.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import SettingsError
from lacre.wire.wiping import overwrite
from lacre_backend.upstream.fields import Headers
from lacre_backend.upstream.settings import UpstreamCredential
from lacre_fabric.keys.secret_files import read_secret

MAX_FILE: Final = 8 * 1024  # bytes: common servers refuse longer header fields
_VALUE: Final = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")  # RFC 9110 section 5.5, without obs-text and tabs
_REMEDY: Final = "Write the credential alone into it, in one line, with mode 0600."

log = structlog.get_logger("lacre.upstream")

_Stamp = tuple[int, int, int, int]  # of a file: another one means other content or permissions


class FixedHeaders:
    """The headers of `upstream.credentials` with the values from their files. Raises SettingsError if a file has none."""

    def __init__(self, credentials: Sequence[UpstreamCredential]) -> None:
        self._credentials = tuple(credentials)
        self._stamps = {each.header: _stamp(each.file) for each in self._credentials}
        self._values = {each.header: _read(each) for each in self._credentials}

    @property
    def headers(self) -> Headers:
        """Secret: for requests to the upstream alone."""
        return [(name.encode(), value) for name, value in self._values.items()]

    def reload(self) -> None:
        """Reads the files that have changed. Another thread may read `headers` meanwhile."""
        for each in self._credentials:
            stamp = _stamp(each.file)
            if stamp == self._stamps[each.header]:
                continue
            self._stamps[each.header] = stamp
            try:
                self._values[each.header] = _read(each)
            except SettingsError as exc:
                log.warning("upstream.credential_kept", reason=str(exc), remedy="correct the file: the last value stays in use")
            else:
                log.info("upstream.credential_read")


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode


def _read(credential: UpstreamCredential) -> bytes:
    """The header's value. Raises SettingsError, which never has any of the file's content."""
    path = credential.file
    stamp = _stamp(path)
    if stamp is not None and stamp[2] > MAX_FILE:
        raise SettingsError(f"{path} is larger than {MAX_FILE} bytes. {_REMEDY}")
    content = read_secret(path, remedy=_REMEDY)
    try:
        value = bytes(content).strip()
    finally:
        overwrite(content)
    if not value:
        raise SettingsError(f"{path} is empty. {_REMEDY}")
    if not _VALUE.fullmatch(value):
        raise SettingsError(f"{path} holds several lines, or characters that a header cannot have. {_REMEDY}")
    scheme = credential.scheme
    if not scheme:
        return value
    if value.lower().startswith(scheme.lower().encode() + b" "):
        raise SettingsError(f"{path} begins with {scheme!r}, which the worker adds itself. {_REMEDY}")
    return scheme.encode() + b" " + value
