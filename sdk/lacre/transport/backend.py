"""Where a thread and an event loop differ: how to sleep, and how to do what takes a while. One pair of functions for each."""

from __future__ import annotations

import time
from collections.abc import Callable


def sleep(seconds: float) -> None:
    time.sleep(seconds)


async def async_sleep(seconds: float) -> None:
    from anyio import sleep  # noqa: PLC0415 - what `import lacre` need not wait for

    await sleep(seconds)


def offload(work: Callable[[], None]) -> None:
    """Does it here: a thread keeps nobody waiting."""
    work()


async def async_offload(work: Callable[[], None]) -> None:
    """Does it on a thread: the event loop's other tasks go on."""
    from anyio import to_thread  # noqa: PLC0415 - as above

    await to_thread.run_sync(work)
