"""Why a worker did not get or did not obey an order, as problem documents."""

from __future__ import annotations

from typing import Final

from lacre.problems import Problem

NO_WORKER: Final = Problem(
    "urn:lacre:problem:no-such-worker", 404, "No live worker has this name",
    "Look at the names in GET /v1/workers, or in `lacre top`.")  # fmt: skip
DEAF: Final = Problem(
    "urn:lacre:problem:worker-hears-no-orders", 409, "This worker can receive no orders",
    "Upgrade the worker, or configure NATS again with this version. Until then, send its process SIGTERM.")  # fmt: skip
SILENT: Final = Problem(
    "urn:lacre:problem:worker-did-not-obey", 504, "The worker did not say that it obeyed",
    "Look in the worker's log for `order.refused`: its clock or its manifest may be old. Then try again.")  # fmt: skip
