"""The differences between a thread and an event loop: how to sleep, and how to run slow work. One pair of functions for
each.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def sleep(seconds: float) -> None:
    time.sleep(seconds)


async def async_sleep(seconds: float) -> None:
    from anyio import sleep  # noqa: PLC0415 - keeps `import lacre` fast

    await sleep(seconds)


def offload(work: Callable[[], None]) -> None:
    """Runs it here: a thread blocks no other."""
    work()


async def async_offload(work: Callable[[], None]) -> None:
    """Runs it on a thread: the event loop's other tasks go on."""
    from anyio import to_thread  # noqa: PLC0415 - as above

    await to_thread.run_sync(work)
