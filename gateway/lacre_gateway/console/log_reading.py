"""Reads the audit logs in another thread, for a page that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lacre import problems
from lacre.errors import InvalidMessage, SettingsError
from lacre_gateway.audit.reader import Wrong
from lacre_gateway.http.refusal import Refusal

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def read_log(reading: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    """What the function returns. Raises Refusal if a log cannot be read or does not hold; the gateway's log says why."""
    try:
        return await asyncio.to_thread(reading, *args, **named)
    except (Wrong, SettingsError, InvalidMessage) as exc:
        raise Refusal(problems.AUDIT_UNAVAILABLE, retry_after=5.0, noted=f"audit log not read: {exc}") from exc
    except OSError as exc:
        raise Refusal(problems.AUDIT_UNAVAILABLE, retry_after=5.0, noted=f"audit log not read: {exc.strerror}") from exc
