"""The password of each handshake with a NATS server, so that an operator can replace it while processes run.

Rules:
- The new password goes into the credential's file first, and then to the servers.
- Until both are done, a connection tries two in turn: the newest password in the file, and the last one that a server accepted.
- A credential of another role is refused: the connection's inbox and subjects are for its own.
"""

from __future__ import annotations

import structlog

from lacre.errors import SettingsError
from lacre.runtime.watched_files import WatchedFiles
from lacre_fabric.nats.roles import Credential

log = structlog.get_logger("lacre.fabric")


class Login:
    """For one connection. credential: the first to try; its file is read again before each handshake."""

    def __init__(self, credential: Credential) -> None:
        """Raises SettingsError if the file has become unusable meanwhile."""
        self._accepted = self._tried = credential
        self._file: WatchedFiles[Credential] | None = None
        if credential.file is not None and credential.file.exists():
            self._file = WatchedFiles([credential.file], self._read, self._tell)

    def next(self) -> Credential:
        """What to try now. After a refusal of the newest it is the last accepted one, and then the newest again."""
        newest = self._newest()
        self._tried = self._accepted if self._tried == newest != self._accepted else newest
        return self._tried

    def accepted(self) -> None:
        """A server took what `next` returned."""
        if self._tried != self._accepted:
            log.info("fabric.password_replaced", role=self._tried.name)
        self._accepted = self._tried

    def has_other(self) -> bool:
        """Whether the file has another password than the one that was accepted: a refusal is not the end then."""
        return self._newest() != self._accepted

    def _newest(self) -> Credential:
        if self._file is None:
            return self._accepted
        self._file.refresh()
        return self._file.value

    def _read(self) -> Credential:
        file, role = self._accepted.file, self._accepted.name
        assert file is not None  # noqa: S101 - else nothing is watched
        found = Credential.load(file)
        if found.name != role:
            raise SettingsError(f"{file} is the credential of {found.name}: put the one of {role} there")
        return found

    def _tell(self, reason: str | None) -> None:
        if reason is not None:
            remedy = "the last good password stays in use"
            log.error("fabric.credential_refused", role=self._accepted.name, reason=reason, remedy=remedy)
