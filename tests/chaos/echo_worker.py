"""A worker whose model echoes: a real node over NATS that really opens, and seals, with keys that change under it.

`python -m chaos.echo_worker SITE NODE MODEL NATS_URL...`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

from lacre_backend.api.app import REPEATABLE, create_app
from lacre_backend.keyring import KeyRing
from lacre_backend.node.node import Identity, Node
from lacre_fabric import logs
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.site import Site
from parts.echo_engine import EchoEngine

POOL: Final = "default"
DELAY: Final = 0.02  # seconds for a token
SLOTS: Final = 16


async def main(folder: Path, name: str, model: str, urls: tuple[str, ...]) -> None:
    logs.configure(sys.stderr)
    site, keys = Site.load(folder), KeyRing(Site.load(folder).keys_folder(POOL))
    credential, receipt_key = site.credential(f"worker-{POOL}-{name}"), read_ed25519(site.receipt_file(POOL))
    fabric = await NatsWorker.connect(Servers(urls), credential, POOL, name, [model], slots=SLOTS, keys=keys.fingerprints)
    feed = ManifestFeed(fabric.connection.manifest, site.root)
    await feed.start()
    app = create_app([EchoEngine(name=model, delay=DELAY)])
    identity = Identity(
        POOL, lambda: keys.keys, receipt_key, lambda: feed.manifest, keys.reload, receipt_keys=lambda: keys.receipt_keys
    )
    node = Node(fabric, app, identity, repeatable=REPEATABLE)
    await asyncio.gather(node.run(), keys.watch())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], tuple(sys.argv[4:])))
