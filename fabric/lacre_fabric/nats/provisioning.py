"""The provisioner's work: creates the streams, consumers and buckets of every pool, and publishes the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import nats.js.errors
from nats.js.api import StreamConfig

from lacre_fabric.nats import streams, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.kv import dump
from lacre_fabric.nats.streams import CLAIMS, BucketLimits
from lacre_fabric.work.contract import ACK_WAIT, FabricUnavailable

_INVALID_CONFIG: Final = 10052  # JSStreamInvalidConfigF, for example an update that NATS does not support


async def provision(
    connection: Connection,
    pools: Mapping[str, Sequence[str]],
    *,
    replicas: int = 1,
    regions: Sequence[str] = subjects.ONE_REGION,
    ack_wait: float = ACK_WAIT,
    claims: BucketLimits = CLAIMS,
) -> None:
    """Creates what is missing and corrects what differs, including replicas and the home region. Safe to repeat.

    pools: each with its models. regions: the home first. claims: the bounds of each pool's claims.

    Queues are in memory. If NATS lost them, gateways and workers continue after this has run again. Raises FabricUnavailable,
    and NewerFormat before it changes the layout of a newer version.
    """
    async with connection.mapped():
        await _check_layout(connection)
        for config in streams.streams(tuple(pools), replicas, regions, claims):
            await _stream(connection, config)
        js = connection.jetstream
        for stream, wanted in streams.consumers(pools, regions, ack_wait).items():
            names = {one.durable_name for one in wanted}
            for consumer in await js.consumers_info(stream):
                if consumer.name not in names:
                    await js.delete_consumer(stream, consumer.name)
            for one in wanted:
                await js.add_consumer(stream, one)


async def _check_layout(connection: Connection) -> None:
    try:
        info = await connection.jetstream.stream_info(f"KV_{subjects.TRUST_BUCKET}")
    except nats.js.errors.NotFoundError:
        return
    streams.LAYOUT.check_header((info.config.metadata or {}).get(streams.LAYOUT_OF))


async def publish_manifest(connection: Connection, document: bytes) -> None:
    """Publishes the signed document to gateways and workers. Raises FabricUnavailable."""
    async with connection.mapped():
        bucket = await connection.jetstream.key_value(subjects.TRUST_BUCKET)
        await bucket.put(subjects.MANIFEST_KEY, document)


async def _stream(connection: Connection, config: StreamConfig) -> None:
    js = connection.jetstream
    try:
        await js.update_stream(config)
    except nats.js.errors.NotFoundError:
        await js.add_stream(config)
    except nats.js.errors.APIError as exc:
        if exc.err_code != _INVALID_CONFIG or config.allow_msg_ttl:
            raise
        await _remake(connection, config)


async def _remake(connection: Connection, config: StreamConfig) -> None:
    """Recreates a bucket of an older version with its content: no update can remove its times to live. A concurrent writer gets
    an error: its write failed or may have.

    Claims are not restored: while they matter, the queue's own duplicate window refuses the same request.
    """
    js, name = connection.jetstream, config.name or ""
    if not (await js.stream_info(name)).config.allow_msg_ttl:
        raise FabricUnavailable(f"NATS cannot update {name}: delete the stream, then provision again")
    kept = {} if config.discard_new_per_subject else await dump(connection, name.removeprefix("KV_"))
    await js.delete_stream(name)
    await js.add_stream(config)
    for key, entry in kept.items():
        await js.publish(f"$KV.{name.removeprefix('KV_')}.{key}", entry.value)
