"""A worker in a process of its own, whose engine says what `parts.scripts` tells it to: all else is as in `lacre worker`.

`python -m parts.scripted_worker SITE NATS_URL`. It prints a line when a task begins, and one with the reason when it ends.
With `LACRE_RECORD` it writes what each request asks into SITE's `asked`, a folder beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lacre.asgi import App
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


def keeping(app: App, folder: Path) -> App:
    """Writes the path and the body of each request, in one file each, in order."""
    numbers = itertools.count()
    folder.mkdir(exist_ok=True)

    async def kept(scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def received() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] == "http.request" and body and not message.get("more_body"):
                asked = {"path": scope["path"], "body": json.loads(body)}
                (folder / f"{next(numbers):06}.json").write_text(json.dumps(asked))
            return message

        await app(scope, received, send)

    return kept


async def main(folder: Path, url: str) -> None:
    engine = ScriptedEngine(scripts.said, n_ctx=CONTEXT, pause=_pause, ended=lambda reason: print(reason, flush=True))
    engine.model = replace(engine.model, chat_template=engine.model.chat_template + THINKS)
    with closing(engine):
        app = create_app([engine])
        if "LACRE_RECORD" in os.environ:
            app = keeping(app, folder.with_name("asked"))
        async with connected_node(Site.load(folder), url, app, slots=SLOTS) as node:
            await node.run()


if __name__ == "__main__":
    asyncio.run(tasks.run(main(Path(sys.argv[1]), sys.argv[2])))
