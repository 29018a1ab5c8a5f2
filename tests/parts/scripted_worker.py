"""A worker in a process of its own, whose engine says what `parts.scripts` tells it to: all else is as in `lacre worker`.

`python -m parts.scripted_worker SITE NATS_URL`. It prints a line when a task begins, and one with the reason when it ends.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from lacre.runtime import tasks
from lacre_backend.api.app import create_app
from lacre_fabric.operate.site import Site
from parts import scripts
from parts.scripted_engine import ScriptedEngine
from parts.stage.live import connected_node

CONTEXT = 1 << 18  # tokens, each of one byte: an agent's instructions alone are 40,000
SLOTS = 8
THINKS = "{# </think> #}"  # in its template: so the model's reasoning has such marks


def _pause(prompt: str) -> float:
    print("begun", flush=True)
    return scripts.pause(prompt)


async def main(folder: Path, url: str) -> None:
    engine = ScriptedEngine(scripts.said, n_ctx=CONTEXT, pause=_pause, ended=lambda reason: print(reason, flush=True))
    engine.model = replace(engine.model, chat_template=engine.model.chat_template + THINKS)
    with closing(engine):
        async with connected_node(Site.load(folder), url, create_app([engine]), slots=SLOTS) as node:
            await node.run()


if __name__ == "__main__":
    asyncio.run(tasks.run(main(Path(sys.argv[1]), sys.argv[2])))
