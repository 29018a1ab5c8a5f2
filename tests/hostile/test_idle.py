"""Copies of idle caches: what a caller gets of another one's conversation that lost its slot."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import FrameType

from hostile.adversary import HttpWire
from hostile.attacks import attack
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.plan import Restore
from lacre_backend.engine.saved import MIN_SAVED
from lacre_backend.engine.scope_ages import SCOPE_LIFE
from lacre_backend.engine.vault import CacheVault
from lacre_backend.engine.vault import _context as vault_context
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage
from parts.tiny_model import tiny_model
from parts.waiting import until

SETTINGS = LlamaSettings(n_ctx=2048, slots=1, threads=1, idle_caches=2**24)
OTHER = "Something else, which pushes it out. " * 10


class Leftovers:
    """What the vault's buffers hold when its calls return. sizes: of the last one. found: calls that left something."""

    def __init__(self) -> None:
        self.sizes = {"save": 0, "_opened": 0, "__init__": 0}
        self.found: list[str] = []

    def look(self, frame: FrameType, event: str, _value: object) -> None:
        name = frame.f_code.co_name
        if event != "return" or name not in self.sizes or not isinstance(frame.f_locals.get("self"), CacheVault):
            return
        held = frame.f_locals.get("key" if name == "__init__" else "plain")
        if held is not None:
            self.sizes[name] = len(held)
            self.found += [name] * any(bytes(held))


@attack("ask for what another caller said, after its cache was copied out of its slot", "client",
        "copies of idle caches are found by scope and adapter, and each is sealed for its own",
        gain="nothing; the prompt is read")  # fmt: skip
async def test_copied(stage: Stage, honest: Stage, wire: HttpWire, issuer: Issuer, tmp_path: Path) -> None:
    """Through the API; and for whoever finds a fault in the search, at the copy itself."""
    prompt, path = stage.prompt * 12, tiny_model(tmp_path / "tiny.gguf")
    with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=SETTINGS)) as engine:
        await stage.worker(create_app([engine]), models=[MODEL])
        victim = stage.client(wire, issuer.token(sub="bob", tenant="other"))
        thief = stage.client(wire, honest.token)
        await victim.chat(prompt, max_tokens=1)
        await thief.chat(OTHER, max_tokens=1)
        assert engine.idle_caches.saved == 1
        reply = await thief.chat(prompt, max_tokens=1)
        assert reply.receipt.cached_tokens < MIN_SAVED
        assert (engine.idle_caches.restored, engine.idle_caches.lost) == (0, 0), "it is not even tried"

        vault, (number, saved) = engine._context.vault, next(iter(engine._scheduler._saved._caches.items()))
        assert vault is not None
        assert not vault.restore(Restore(0, number, saved.length, saved.length - 1, "t", b"the thief's", None))

        back = await victim.chat(prompt, max_tokens=1)
        assert back.receipt.cached_tokens >= MIN_SAVED, "its own caller gets it"


@attack("read copies of idle caches in memory that was swapped out, or that a fault of the engine shows", "client",
        "copies are sealed under a key of the process, each piece under a nonce of its own",
        gain="sealed bytes, which open under the key alone")  # fmt: skip
async def test_dumped(stage: Stage, honest: Stage, wire: HttpWire, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf")
    with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=SETTINGS)) as engine:
        await stage.worker(create_app([engine]), models=[MODEL])
        for prompt in (stage.prompt * 12, OTHER, OTHER[::-1]):
            await stage.client(wire, honest.token).chat(prompt, max_tokens=1)
        vault, saved = engine._context.vault, engine._scheduler._saved._caches
        assert vault is not None and vault._key is not None and len(saved) == 2
        nonces = []
        for number, cache in saved.items():
            copy, (scope, adapter) = vault._copies[number], cache.owner
            context = vault_context(Restore(0, number, cache.length, cache.length, "t", scope, adapter))
            plain = b""
            for i, piece in enumerate(copy.pieces):
                nonces.append(copy.nonce + i)
                plain += vault._key.decrypt(nonces[-1].to_bytes(12, "big"), bytes(piece), context)
            assert len(plain) == copy.size
            parts = {plain[at : at + 64] for at in range(0, len(plain) - 64, 64)} - {bytes(64)}
            assert not [part for part in parts if any(part in piece for piece in copy.pieces)]
        assert len(set(nonces)) == len(nonces) >= 2


@attack("read what the engine left in its memory after it sealed or restored a copy of an idle cache", "client",
        "the plain bytes of a copy are overwritten at once, and its key once the cipher has it")  # fmt: skip
async def test_wiped(stage: Stage, honest: Stage, wire: HttpWire, tmp_path: Path) -> None:
    """A profiler sees the engine's own arrays as each call of the vault returns."""
    path, left = tiny_model(tmp_path / "tiny.gguf"), Leftovers()
    threading.setprofile(left.look)  # of the engine's threads, which start now
    sys.setprofile(left.look)
    try:
        with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=SETTINGS)) as engine:
            await stage.worker(create_app([engine]), models=[MODEL])
            caller = stage.client(wire, honest.token)
            for prompt in (stage.prompt * 12, OTHER, stage.prompt * 12):
                await caller.chat(prompt, max_tokens=1)
            assert engine.idle_caches.saved >= 1 and engine.idle_caches.restored == 1
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert left.sizes["save"] > 0 and left.sizes["_opened"] > 0 and left.sizes["__init__"] == 32
    assert not left.found


@attack("come back with a salt that was stolen, after its hour", "client",
        "copies of idle caches go with their scope, an hour after its last use",
        gain="nothing; the prompt is read")  # fmt: skip
async def test_aged(stage: Stage, honest: Stage, wire: HttpWire, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf")
    with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=SETTINGS)) as engine:
        await stage.worker(create_app([engine]), models=[MODEL])
        victim, other = stage.client(wire, honest.token), stage.client(wire, honest.token)
        await victim.chat(stage.prompt * 12, max_tokens=1)
        await other.chat(OTHER, max_tokens=1)
        vault, ages = engine._context.vault, engine._caches._ages
        assert vault is not None and len(vault._copies) == 1
        old = engine._scheduler._saved._caches[next(iter(vault._copies))].owner[0]
        ages.use(old, time.monotonic() - 2 * SCOPE_LIFE)
        await other.chat(OTHER, max_tokens=1)  # it wakes the engine, which then has nothing to do
        await until(lambda: not vault._copies)
        assert (vault.counts.bytes, len(engine._scheduler._saved)) == (0, 0)
        reply = await victim.chat(stage.prompt * 12, max_tokens=1)
        assert reply.receipt.cached_tokens < MIN_SAVED
