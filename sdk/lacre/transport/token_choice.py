"""Which token a client uses: the caller's, the environment's, or the login of this machine's user. In this order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from lacre.transport.oauth import AsyncToken, Token, checked_source

if TYPE_CHECKING:
    from lacre.transport.login import UserLogin


def async_source(value: AsyncToken | None, root: bytes) -> AsyncToken:
    """The value of `token=`. Only if it is None: LACRE_TOKEN, or else the login at the deployment of this root. Raises
    UsageError or SettingsError.
    """
    login = _saved_login(value, root)
    return checked_source(value) if login is None else login.awaited


def source(value: Token | None, root: bytes) -> Token:
    """The same for a sync client, whose callable returns the token itself; `lacre.transport.oauth.given` checks that."""
    login = _saved_login(value, root)
    return cast("Token", checked_source(value)) if login is None else login


def _saved_login(value: object, root: bytes) -> UserLogin | None:
    """None if the caller passed a token, or the environment has one."""
    if value is not None or os.environ.get("LACRE_TOKEN"):
        return None
    from lacre.transport.login import UserLogin  # noqa: PLC0415 - few programs need it

    return UserLogin.find(root)
