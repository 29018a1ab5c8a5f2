"""Every stream, bucket and consumer that Lacre needs, as values: what provisioning makes, and a check compares with.

Rules:
- Queues are in memory: whoever waits in them has a client that waits too. What must outlive every server is in files.
- Of several regions the first is the home: what must be the same for all is kept there, claims and budgets above all. Each pool
  has a queue in every region, in that region's servers.
- Each stream is kept by as many servers as `replicas` says, and no consumer by fewer: it has its stream's replicas.
- Every stream has bounds, and JetStream reserves its bytes when the stream is made. So no stream can take another's room: a
  worker that fills its pool's claims stops its own pool, and budgets and revocations still take writes.
- No bucket takes roll-ups, deletes or purges: one message cannot remove what others wrote. Only queues and revocations take
  a time to live from the writer. Elsewhere a writer could outlive `max_age`, or have an entry vanish.
- A claim is written once. A second write of the same key is refused, whatever it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, Placement, RetentionPolicy, StorageType, StreamConfig

from lacre_fabric.nats import revocations, subjects
from lacre_fabric.work.contract import ACK_WAIT, CLAIM_TTL, DUPLICATE_WINDOW, MAX_DELIVER

REPLICAS: Final = (1, 3, 5)  # of a stream: with an even number as many servers may fail as with one less
QUEUED_MESSAGES: Final = 1000  # of one pool; past it the gateway answers 503 at once
QUEUED_BYTES: Final = 128 * 2**20
MAX_PAYLOAD: Final = 9 * 2**20  # bytes of one message: a sealed request of 7 MiB, its grant and headers, with room
# A budget that nobody has drawn from for so long is forgotten: twice the longest window, so that it is long over.
BUDGET_TTL: Final = 62 * 86400.0
MAX_ACK_PENDING: Final = 100_000  # at least every slot of a pool; the default of 1000 would stall a large one
_KV_DUPLICATES: Final = 120.0  # seconds: what every client of NATS gives a bucket


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """What a bucket may hold. size: bytes in all. messages: how many. largest: bytes of one message, with its headers."""

    size: int
    messages: int
    largest: int


TRUST: Final = BucketLimits(16 * 2**20, 16, 2**20 + 4096)  # one document of `manifest.MAX_DOCUMENT`, with headers
# A record has a line for each lease: 60 bytes for each process, kind and window. Records of 1 KB are usual.
BUDGETS: Final = BucketLimits(512 * 2**20, 500_000, 256 * 1024)
# A claim takes some 300 bytes: for `CLAIM_TTL` that is 250 requests a second of one pool. Its value has 32 bytes.
CLAIMS: Final = BucketLimits(64 * 2**20, 220_000, 512)


def streams(
    pools: Sequence[str], replicas: int, regions: Sequence[str] = subjects.ONE_REGION, claims: BucketLimits = CLAIMS
) -> list[StreamConfig]:
    """claims: the bounds of each pool's claims. Raises SettingsError for the name of a pool or a region that is none."""
    home = [
        _bucket(subjects.TRUST_BUCKET, None, replicas, TRUST),
        revocations.bucket(replicas),
        _bucket(subjects.BUDGETS_BUCKET, BUDGET_TTL, replicas, BUDGETS),
        *(_claims(pool, replicas, claims) for pool in pools),
    ]
    placed = [_placed(bucket, regions[0], regions) for bucket in home]
    return placed + [_placed(_work(pool, region, replicas), region, regions) for pool in pools for region in regions]


def consumers(
    pools: Mapping[str, Sequence[str]], regions: Sequence[str] = subjects.ONE_REGION, ack_wait: float = ACK_WAIT
) -> dict[str, list[ConsumerConfig]]:
    """Of each stream that has some: one for each model."""
    return {
        subjects.work_stream(pool, region): [_consumer(pool, region, model, ack_wait) for model in models]
        for pool, models in pools.items()
        for region in regions
    }


def _placed(stream: StreamConfig, region: str, regions: Sequence[str]) -> StreamConfig:
    """Where there is one region, its servers may have any cluster's name, or be one server without any."""
    subjects.check_region(region)
    return stream if len(regions) == 1 else stream.evolve(placement=Placement(cluster=region))


def _work(pool: str, region: str, replicas: int) -> StreamConfig:
    return StreamConfig(
        name=subjects.work_stream(pool, region),
        subjects=[f"work.{pool}.{region}.*"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.MEMORY,
        num_replicas=replicas,
        discard=DiscardPolicy.NEW,
        max_msgs=QUEUED_MESSAGES,
        max_bytes=QUEUED_BYTES,
        max_msg_size=MAX_PAYLOAD,
        duplicate_window=DUPLICATE_WINDOW,
        allow_msg_ttl=True,
    )


def _consumer(pool: str, region: str, model: str, ack_wait: float) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=subjects.consumer(model),
        filter_subject=subjects.work(pool, region, model),
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        max_deliver=MAX_DELIVER,
        max_ack_pending=MAX_ACK_PENDING,
    )


def _claims(pool: str, replicas: int, bounds: BucketLimits) -> StreamConfig:
    bucket = _bucket(subjects.claims_bucket(subjects.check_name("pool", pool)), CLAIM_TTL, replicas, bounds)
    return bucket.evolve(discard_new_per_subject=True)


def _bucket(name: str, ttl: float | None, replicas: int, bounds: BucketLimits) -> StreamConfig:
    """A bucket with the newest value of each key, as NATS's clients know it."""
    return StreamConfig(
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        storage=StorageType.FILE,
        num_replicas=replicas,
        discard=DiscardPolicy.NEW,
        max_age=ttl,
        max_bytes=bounds.size,
        max_msgs=bounds.messages,
        max_msg_size=bounds.largest,
        max_msgs_per_subject=1,
        duplicate_window=_KV_DUPLICATES,
        allow_direct=True,
        allow_rollup_hdrs=False,
        allow_msg_ttl=False,
        deny_delete=True,
        deny_purge=True,
    )
