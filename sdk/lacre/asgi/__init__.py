"""Serving sealed requests: `answer` and `open_sealed` for a worker's node, `Sealed` for any ASGI app of your own.

Open `sealed.py` first: the ASGI app around another. `app_call.py` calls an app with one opened request.
"""

from lacre.asgi.app_call import (
    EXTENSION,
    MAX_PENDING,
    SCHEME,
    App,
    Call,
    Disconnected,
    Message,
    Opened,
    Receive,
    Scope,
    Send,
    Usage,
    answer,
    decoded_path,
    open_sealed,
    refuse,
)
from lacre.asgi.sealed import Sealed, key_file, pin
from lacre.errors import AppFailed
from lacre.wire.header import AUTHORITY

__all__ = [
    "AUTHORITY",
    "EXTENSION",
    "MAX_PENDING",
    "SCHEME",
    "App",
    "AppFailed",
    "Call",
    "Disconnected",
    "Message",
    "Opened",
    "Receive",
    "Scope",
    "Sealed",
    "Send",
    "Usage",
    "answer",
    "decoded_path",
    "key_file",
    "open_sealed",
    "pin",
    "refuse",
]
