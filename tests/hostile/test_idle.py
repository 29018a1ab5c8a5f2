"""Copies of idle caches: what a caller gets of another one's conversation that lost its slot."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from hostile.adversary import HttpWire
from hostile.attacks import attack
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.plan import Restore
from lacre_backend.engine.saved import MIN_SAVED
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage
from parts.tiny_model import tiny_model

OTHER = "Something else, which pushes it out. " * 10


@attack("ask for what another caller said, after its cache was copied out of its slot", "client",
        "copies of idle caches are found by scope and adapter, and each is sealed for its own",
        gain="nothing; the prompt is read")  # fmt: skip
async def test_copied(stage: Stage, honest: Stage, wire: HttpWire, issuer: Issuer, tmp_path: Path) -> None:
    """Through the API; and for whoever finds a fault in the search, at the copy itself."""
    settings, prompt = LlamaSettings(n_ctx=2048, slots=1, threads=1, idle_caches=2**24), stage.prompt * 12
    path = tiny_model(tmp_path / "tiny.gguf")
    with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=settings)) as engine:
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
