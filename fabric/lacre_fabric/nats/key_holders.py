"""Finds which live workers of a pool hold which keys. Used before a key is listed, and after one was destroyed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from lacre.errors import InvalidMessage
from lacre.trust.manifest import fingerprint
from lacre.wire.header import KeyConfig
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.work.contract import PRESENT_FOR
from lacre_fabric.work.presence import MAX_NODES, accepts_grants_of, keys_in, receipts_by

_LOOK: Final = 0.1  # seconds between checks of the presence received


class RollCall:
    """The keys that the live workers of one pool announce."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._heard: dict[str, tuple[float, frozenset[str]]] = {}  # by region and node

    async def hear(self, message: Msg) -> None:
        keys: frozenset[str] = frozenset()  # for a worker that announces no keys
        with suppress(InvalidMessage):
            keys = keys_in(message.data)
        try:
            _, region, node = subjects.parse_presence(message.subject)
        except InvalidMessage:
            return  # not a worker's name
        name = node if region == subjects.DEFAULT_REGION else f"{region}/{node}"
        if name in self._heard or len(self._heard) < MAX_NODES:
            self._heard[name] = (time.monotonic(), keys)

    @property
    def complete(self) -> bool:
        """Whether every live worker has had time to announce itself."""
        return time.monotonic() >= self._since + PRESENT_FOR

    def holders(self) -> dict[str, frozenset[str]]:
        """Each live worker, and the keys it holds."""
        since = time.monotonic() - PRESENT_FOR
        return {node: keys for node, (at, keys) in self._heard.items() if at >= since}


async def _until(connection: Connection, pool: str, limit: float, done: Callable[[RollCall], bool]) -> RollCall:
    call = RollCall()
    async with connection.mapped(confirmed=True):
        subscription = await connection.client.subscribe(subjects.presence(pool, "*", "*"), cb=call.hear)
    try:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and not (call.complete and done(call)):
            await asyncio.sleep(_LOOK)
    finally:
        with suppress(nats.errors.Error):  # a lost connection has no subscriptions
            await subscription.unsubscribe()
    return call


async def await_holders(
    connection: Connection, pool: str, configs: Sequence[KeyConfig], limit: float, receipt_key: bytes | None = None
) -> tuple[frozenset[str], frozenset[str]]:
    """Waits until every live worker of the pool holds all of these keys, for at most `limit` seconds.

    receipt_key: the one of these keys, if they have their own. Returns the workers that do and those that do not. Raises
    FabricUnavailable.
    """
    keys = frozenset(map(fingerprint, configs))
    wanted = keys if receipt_key is None else keys | {receipts_by(key, receipt_key) for key in keys}
    call = await _until(connection, pool, limit, lambda call: all(wanted <= keys for keys in call.holders().values()))
    have = frozenset(node for node, keys in call.holders().items() if wanted <= keys)
    return have, frozenset(call.holders()) - have


async def await_accepting(connection: Connection, pool: str, gateway_key: bytes, limit: float) -> frozenset[str]:
    """Waits until every live worker of the pool accepts grants of this key, for at most `limit` seconds.

    Returns the workers that do not. Raises FabricUnavailable.
    """
    wanted = accepts_grants_of(gateway_key)
    call = await _until(connection, pool, limit, lambda call: all(wanted in keys for keys in call.holders().values()))
    return frozenset(node for node, keys in call.holders().items() if wanted not in keys)


async def await_gone(connection: Connection, pool: str, configs: Sequence[KeyConfig], limit: float) -> frozenset[str]:
    """Waits until no live worker of the pool holds any of these keys. Returns those that still do. Raises FabricUnavailable."""
    gone = frozenset(map(fingerprint, configs))
    call = await _until(connection, pool, limit, lambda call: not any(gone & keys for keys in call.holders().values()))
    return frozenset(node for node, keys in call.holders().items() if gone & keys)
