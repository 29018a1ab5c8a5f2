"""Pages of the operators' console over an audit log of 100,000 requests: how long the server takes for each.

    PYTHONPATH=tests .venv/bin/python -m bench.console [--requests N]

It prints milliseconds of each page, the median and the worst of ten, and compares with nothing. The gateway is in this process,
over a fabric in memory; the log, the index and the rules are real. A day of minutes is in the overview's file.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.audit_years import fill
from lacre_gateway.audit.store import Store
from lacre_gateway.console.minutes import Minute
from parts.console_browser import SETTINGS, Desk
from parts.issuer import Issuer
from parts.stage import Stage

TIMES: Final = 10
_BEGIN: Final = 1_790_000_000  # of the log's first request; see `audit_years`
PAGES: Final = (
    "/console/", "/console/tenants", "/console/tenant?tenant=acme", "/console/requests",
    "/console/requests?subject=user-7@example.com",
    "/console/requests?subject=user-7@example.com&outcome=answered", "/console/requests?outcome=answered",
    "/console/requests?outcome=broken", "/console/requests?tenant=acme&since=2026-09-22T12:00&until=2026-09-22T13:00",
    "/console/requests?subject=nobody", "/console/requests?before=50000", "/console/request?id=" + f"{777:032x}",
    "/console/proof?id=" + f"{777:032x}", "/console/policy", "/console/keys", "/console/workers",
    "/console/audit", "/console/me",
)  # fmt: skip


async def pages(folder: Path, requests: int) -> None:
    stage = Stage()
    store = Store(folder / "audit", stage.keys.gateway, "127.0.0.1/audit/g1")
    fill(store, requests)
    store.close()
    stage.build_gateway(folder, Issuer(), settings=SETTINGS)
    async with stage:
        await stage.publish(stage.document())
        desk = Desk(stage)
        began = time.perf_counter()
        await asyncio.to_thread(desk.console.index.catch_up)
        size = sum(path.stat().st_size for path in desk.console.folder.iterdir()) / 2**20
        print(f"{'index made':<74}{time.perf_counter() - began:>8.1f} s  {size:.0f} MiB", flush=True)
        now = int(stage.gateway.clock() // 60)
        for at in range(now - 1440, now):
            await asyncio.to_thread(
                desk.console.store.add,
                Minute(at, at % 97, at % 7, 0, 40.0, 90.0 + at % 50, 4000, 1000, 900, at % 3, at % 16, 16, 2),
            )
        root = await desk.signed_in()
        for path in PAGES:
            taken = []
            for _ in range(TIMES):
                began = time.perf_counter()
                answer = await root.get(path)
                taken.append(1000 * (time.perf_counter() - began))
                assert answer.status_code == 200, (path, answer.text)
            size = len(answer.content) / 1024
            print(f"{path:<74}{statistics.median(taken):>8.0f} ms, worst {max(taken):.0f} ms, {size:.0f} KiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    with tempfile.TemporaryDirectory(prefix="lacre-console-") as made:
        asyncio.run(pages(Path(made), parser.parse_args().requests))
