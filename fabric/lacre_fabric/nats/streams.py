"""Every stream, bucket and consumer that Lacre needs, as values: provisioning creates them, and a check compares with them.

Rules:
- Queues are in memory: each waiting request has a client that waits too. State that must survive a restart of all servers is in
  files.
- The first of several regions is the home. State that must be the same everywhere lives there, above all claims and budgets.
- Each pool has a queue in every region, on that region's servers.
- Each stream has `replicas` copies, and its consumers have as many.
- The bucket of trust comes after the stores that must survive. So a site that has published a manifest had them all, and one
  that is missing later was lost (`lacre_fabric.operate.stores`).
- Every stream has bounds, and JetStream reserves its bytes when the stream is created. So a worker that fills its pool's claims
  stops only its own pool. Budgets and revocations still accept writes.
- No bucket allows roll-ups, deletes or purges: one message cannot remove other writers' entries. Only queues and revocations
  accept a time to live from the writer. Elsewhere a writer could outlive `max_age`, or make an entry vanish.
- A claim is written once. A second write of the same key is refused, even with the same value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, Placement, RetentionPolicy, StorageType, StreamConfig

from lacre.jose.formats import Format
from lacre_fabric.nats import revocations, subjects
from lacre_fabric.work.contract import ACK_WAIT, CLAIM_TTL, DUPLICATE_WINDOW, MAX_DELIVER

LAYOUT: Final = Format("NATS layout", "command")
LAYOUT_OF: Final = "lacre.v"  # in the metadata of the bucket of trust: the layout's version, unless it is 1
REPLICAS: Final = (1, 3, 5)  # of a stream: an even number tolerates no more failures than one less
QUEUED_MESSAGES: Final = 1000  # of one pool; beyond it the gateway answers 503 at once
QUEUED_BYTES: Final = 128 * 2**20
MAX_PAYLOAD: Final = 9 * 2**20  # bytes of one message: a sealed request of 7 MiB, its grant and headers, with a margin
# Seconds until an unused budget is deleted: twice the longest window, so that the window is long over.
BUDGET_TTL: Final = 62 * 86400.0
MAX_ACK_PENDING: Final = 100_000  # at least all slots of a pool; the default of 1000 would stall a large one
_KV_DUPLICATES: Final = 120.0  # seconds: every NATS client gives buckets this value


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """The bounds of a bucket. size: bytes in total. messages: their number. largest: bytes of one message with headers."""

    size: int
    messages: int
    largest: int


TRUST: Final = BucketLimits(16 * 2**20, 16, 2**20 + 4096)  # one document of `manifest.MAX_DOCUMENT`, with headers
# A record has a line of 60 bytes for each lease, that is for each process, kind and window. Typical records have 1 KB.
BUDGETS: Final = BucketLimits(512 * 2**20, 500_000, 256 * 1024)
# A claim takes about 300 bytes, so for `CLAIM_TTL` this allows 250 requests a second per pool. Its value has 32 bytes.
CLAIMS: Final = BucketLimits(64 * 2**20, 220_000, 512)


def streams(
    pools: Sequence[str], replicas: int, regions: Sequence[str] = subjects.ONE_REGION, claims: BucketLimits = CLAIMS
) -> list[StreamConfig]:
    """claims: the bounds of each pool's claims. Raises SettingsError for an invalid name of a pool or region."""
    home = [
        revocations.bucket(replicas),
        _bucket(subjects.BUDGETS_BUCKET, BUDGET_TTL, replicas, BUDGETS),
        _bucket(subjects.TRUST_BUCKET, None, replicas, TRUST),
        *(_claims(pool, replicas, claims) for pool in pools),
    ]
    placed = [_placed(bucket, regions[0], regions) for bucket in home]
    return placed + [_placed(_work(pool, region, replicas), region, regions) for pool in pools for region in regions]


def consumers(
    pools: Mapping[str, Sequence[str]], regions: Sequence[str] = subjects.ONE_REGION, ack_wait: float = ACK_WAIT
) -> dict[str, list[ConsumerConfig]]:
    """The consumers of each stream that has some: one per model."""
    return {
        subjects.work_stream(pool, region): [_consumer(pool, region, model, ack_wait) for model in models]
        for pool, models in pools.items()
        for region in regions
    }


def _placed(stream: StreamConfig, region: str, regions: Sequence[str]) -> StreamConfig:
    """With one region, its servers may have any cluster name, or be one server without a cluster."""
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
    """A bucket that keeps the newest value of each key, as NATS clients expect it."""
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
