"""The frames of an answer, for a loop: `Dispatch.next` called until the last one."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from lacre_fabric.work.contract import Dispatch
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound


async def frames_of(dispatch: Dispatch) -> AsyncGenerator[Frame, None]:
    """A reader that ends before the last frame cancels the work, as a gateway does."""
    last = False
    try:
        while not last:
            frame = await dispatch.next()
            last = frame.kind in (FrameKind.USAGE, FrameKind.ERROR)
            yield frame
    finally:
        if not last:
            await dispatch.cancel()


async def frames_in(inbound: Inbound) -> AsyncGenerator[Frame, None]:
    """The frames of an answer that came without a fabric."""
    while True:
        frame = await inbound.next()
        yield frame
        if frame.kind in (FrameKind.USAGE, FrameKind.ERROR):
            return
