"""One run, from an empty folder to its result."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from chaos import findings, load
from chaos.findings import Result
from chaos.schedule import draw
from chaos.stage import TESTS, Stage
from chaos.strikes import Strikes
from chaos.vitals import Life, Vitals
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.leash import PYTHON
from parts.stage.processes import launched

RATE: Final = 4.0  # requests in a second, in the mix of `load`: what two cores serve and have time left for the rest
CALLERS: Final = 6
QUIET: Final = 6.0  # seconds after the last answer, for what is settled after it


BY_PYTHON: Final = (*PYTHON, "-m", "chaos.load")
BY_NODE: Final = ("node", str(Path(__file__).parent / "load.mjs"))


async def run(folder: Path, seed: int, seconds: float, clients: Sequence[str] = BY_PYTHON) -> Result:
    """clients: the program that asks, before its arguments."""
    stage = Stage(folder)
    try:
        await stage.start()
        return await _struck(stage, folder, seed, seconds, clients)
    finally:
        await stage.close()


async def _struck(stage: Stage, folder: Path, seed: int, seconds: float, clients: Sequence[str]) -> Result:
    vitals, strikes = Vitals(stage.parts), Strikes(stage)
    issuer = read_ed25519(stage.site.folder / "issuer.pem")
    passes = tuple(dev_issuer.issue(issuer, f"user-{number}", tenant="acme") for number in range(CALLERS))
    plan = load.Plan(stage.url, passes, seed, seconds, RATE)
    watching = asyncio.create_task(vitals.watch())
    with _asking(folder, plan, clients) as asking:
        await strikes.run(draw(seed, seconds), time.monotonic())
        status = await asyncio.to_thread(asking.wait, seconds + load.HUNG)
    assert status == 0, (folder / "load.log").read_text()[-2000:]
    await asyncio.sleep(QUIET)
    watching.cancel()
    vitals.look()
    survivors = vitals.alive()
    await stage.stop_gateways()
    return _result(stage, folder, plan, strikes, survivors)


@contextmanager
def _asking(folder: Path, plan: load.Plan, clients: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    command = [*clients, str(folder / "plan.json"), str(folder / "ends.jsonl")]
    asking = launched(command, folder / "load.log", env=TESTS)
    try:
        yield asking
    finally:
        asking.kill()
        asking.wait()


def _result(stage: Stage, folder: Path, plan: load.Plan, strikes: Strikes, survivors: list[Life]) -> Result:
    ends, proofs = load.read(folder / "ends.jsonl")
    ended, errors = findings.summed(ends)
    asked = int(plan.seconds * plan.rate)
    killed = frozenset(stage.gateways) & (stage.killed | stage.alone.keys())
    return Result(
        seed=plan.seed,
        seconds=plan.seconds,
        rate=plan.rate,
        ended=ended,
        errors=errors,
        resumed=sum(end.resumed for end in ends),
        strikes=strikes.done,
        left_out=stage.why_not(),
        alone=dict(stage.alone),
        failed=strikes.failed,
        outage=round(findings.outage(ends), 1),
        wait=round(max(end.took for end in ends), 1),
        proofs=len(proofs),
        lives={life.name: _life(life) for life in survivors if life.settled is not None},
        violations=findings.violations(stage, ends, asked, proofs, survivors, killed),
    )


def _life(life: Life) -> str:
    assert life.settled is not None
    (memory, descriptors), (memory_now, descriptors_now) = life.settled, life.now
    return f"{memory >> 20} → {memory_now >> 20} MiB, {descriptors} → {descriptors_now} descriptors in {life.watched:.0f} s"
