"""A site whose keys are tended while workers hold them: over a real nats-server and real files."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lacre.trust.chain import verify
from lacre.trust.manifest import Manifest
from lacre_backend.keyring import KeyRing
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from parts.fabric import POOLS, LiveFabric, Parties

POOL = "a"


@dataclass
class TendedSite(Parties):
    """A site, its provisioner's connection, and workers that hold what they say."""

    site: Site
    connection: Connection

    async def holding(self, node: str = "n1", *, watches: bool = False, pool: str = POOL) -> KeyRing:
        """A live worker's keys: those of the folder as it is now, or as it becomes where it watches."""
        ring = KeyRing(self.site.keys_folder(pool))
        self.stack.callback(ring.close)
        await self.worker(pool, node, keys=ring.fingerprints)
        if watches:
            self.background(ring.watch())
        return ring

    async def manifest(self) -> bytes:
        """What is on the fabric."""
        document = await self.connection.manifest()
        assert document is not None
        return document

    async def verified(self) -> Manifest:
        return verify(await self.manifest(), self.site.root, time.time()).manifest

    async def listed(self, pool: str = POOL) -> list[int]:
        """The ids of the pool's keys in the manifest."""
        return [key.config.key_id for key in (await self.verified()).pools[pool].keys]

    def in_folder(self, pool: str = POOL) -> str:
        """The ids of the keys in the pool's folder."""
        return " ".join(sorted(path.stem for path in self.site.keys_folder(pool).iterdir()))

    def damage(self) -> tuple[Path, bytes]:
        """The file that pool `a` cannot be read without, and what was in it."""
        path = self.site.folder / "pools" / POOL / "generations.json"
        before = path.read_bytes()
        path.write_bytes(b"{")
        return path, before

    @classmethod
    @asynccontextmanager
    async def on(cls, live: LiveFabric, folder: Path, *pools: str) -> AsyncIterator[TendedSite]:
        site = Site(folder, {pool: POOLS[pool] for pool in pools})
        site.create()
        async with Parties.of(live) as parties:
            connection = await parties.connect()
            await publish(site, connection)
            yield cls(parties.stack, live, site, connection)
            await connection.jetstream.delete_stream("KV_trust")  # the next test makes it again
