"""What only the provisioner does: creates the streams, consumers and buckets of every pool, and publishes the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import nats.js.errors
from nats.js.api import StreamConfig

from lacre_fabric import layout, subjects
from lacre_fabric.connection import Connection
from lacre_fabric.work import ACK_WAIT


async def provision(
    connection: Connection,
    pools: Mapping[str, Sequence[str]],
    *,
    replicas: int = 1,
    regions: Sequence[str] = subjects.ONE_REGION,
    ack_wait: float = ACK_WAIT,
) -> None:
    """Creates what is missing and mends what differs, the number of replicas and the home too; safe to repeat. pools: each with
    its models. regions: the home first.

    Queues are in memory: where NATS lost them, gateways and workers go on once this has run again. Raises FabricUnavailable.
    """
    async with connection.mapped():
        for config in layout.streams(tuple(pools), replicas, regions):
            await _stream(connection, config)
        js = connection.jetstream
        for stream, wanted in layout.consumers(pools, regions, ack_wait).items():
            names = {one.durable_name for one in wanted}
            for consumer in await js.consumers_info(stream):
                if consumer.name not in names:
                    await js.delete_consumer(stream, consumer.name)
            for one in wanted:
                await js.add_consumer(stream, one)


async def publish_manifest(connection: Connection, document: bytes) -> None:
    """Puts the signed document where gateways and workers read it. Raises FabricUnavailable."""
    async with connection.mapped():
        bucket = await connection.jetstream.key_value(subjects.TRUST_BUCKET)
        await bucket.put(subjects.MANIFEST_KEY, document)


async def _stream(connection: Connection, config: StreamConfig) -> None:
    try:
        await connection.jetstream.update_stream(config)
    except nats.js.errors.NotFoundError:
        await connection.jetstream.add_stream(config)
