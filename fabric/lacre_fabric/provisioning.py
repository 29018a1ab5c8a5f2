"""What only the provisioner does: creates the streams, consumers and buckets of every pool, and publishes the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import nats.js.errors
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from lacre_fabric import nats_revocations, subjects
from lacre_fabric.connection import Connection
from lacre_fabric.work import ACK_WAIT, CLAIM_TTL, DUPLICATE_WINDOW, MAX_DELIVER

QUEUED_MESSAGES: Final = 1000  # of one pool; past it the gateway answers 503 at once
QUEUED_BYTES: Final = 128 * 2**20
# A budget that nobody has drawn from for so long is forgotten: twice the longest window, so that it is long over.
BUDGET_TTL: Final = 62 * 86400.0
MAX_ACK_PENDING: Final = 100_000  # at least every slot of a pool; the default of 1000 would stall a large one


async def provision(
    connection: Connection, pools: Mapping[str, Sequence[str]], *, replicas: int = 1, ack_wait: float = ACK_WAIT
) -> None:
    """Creates what is missing and mends what differs in queues; safe to repeat. pools: each with its models.

    Queues are in memory: where NATS lost them, gateways and workers go on once this has run again. Raises FabricUnavailable.
    """
    async with connection.mapped():
        await _bucket(connection, subjects.TRUST_BUCKET, ttl=None, replicas=replicas)
        await _stream(connection, nats_revocations.bucket(replicas))
        await _bucket(connection, subjects.BUDGETS_BUCKET, ttl=BUDGET_TTL, replicas=replicas)
        for pool, models in pools.items():
            await _work(connection, subjects.check_name("pool", pool), models, replicas, ack_wait)
            await _bucket(connection, subjects.claims_bucket(pool), ttl=CLAIM_TTL, replicas=replicas)


async def publish_manifest(connection: Connection, document: bytes) -> None:
    """Puts the signed document where gateways and workers read it. Raises FabricUnavailable."""
    async with connection.mapped():
        bucket = await connection.jetstream.key_value(subjects.TRUST_BUCKET)
        await bucket.put(subjects.MANIFEST_KEY, document)


async def _work(connection: Connection, pool: str, models: Sequence[str], replicas: int, ack_wait: float) -> None:
    stream = subjects.work_stream(pool)
    config = StreamConfig(
        name=stream,
        subjects=[f"work.{pool}.*"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.MEMORY,
        num_replicas=replicas,
        discard=DiscardPolicy.NEW,
        max_msgs=QUEUED_MESSAGES,
        max_bytes=QUEUED_BYTES,
        duplicate_window=DUPLICATE_WINDOW,
        allow_msg_ttl=True,
    )
    await _stream(connection, config)
    js = connection.jetstream
    wanted = {subjects.consumer(model): subjects.work(pool, model) for model in models}
    for consumer in await js.consumers_info(stream):
        if consumer.name not in wanted:
            await js.delete_consumer(stream, consumer.name)
    for name, subject in wanted.items():
        await js.add_consumer(
            stream,
            ConsumerConfig(
                durable_name=name,
                filter_subject=subject,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ack_wait,
                max_deliver=MAX_DELIVER,
                max_ack_pending=MAX_ACK_PENDING,
            ),
        )


async def _stream(connection: Connection, config: StreamConfig) -> None:
    try:
        await connection.jetstream.update_stream(config)
    except nats.js.errors.NotFoundError:
        await connection.jetstream.add_stream(config)


async def _bucket(connection: Connection, name: str, *, ttl: float | None, replicas: int) -> None:
    js = connection.jetstream
    try:
        await js.key_value(name)
    except nats.js.errors.BucketNotFoundError:
        await js.create_key_value(
            KeyValueConfig(bucket=name, history=1, ttl=ttl, storage=StorageType.FILE, replicas=replicas, direct=True)
        )
