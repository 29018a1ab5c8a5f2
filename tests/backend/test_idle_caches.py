"""Idle caches in memory: a conversation that lost its slot comes back warm, with the logits it would have had."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, Made, made
from lacre.errors import SettingsError
from lacre_backend.engine import scope_ages
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.context import Compute, KvType, LlamaContext
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.plan import EngineLimits, Restore, Save, Segment, StepPlan, Trim
from lacre_backend.engine.sizing import IDLE_SHARE, OVERHEAD, derive
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tokens import BLOCK
from lacre_backend.engine.vault import CacheVault
from parts.tiny_model import tiny_lora, tiny_model
from parts.waiting import until

HEADS = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.rope.dimension_count": 32}
SETTINGS = LlamaSettings(n_ctx=512, slots=2, threads=1, idle_caches=2**24)
PROMPT = tuple(3 + i * i % 250 for i in range(300))
LONGER = (*PROMPT, *(5 + i for i in range(40)))
PLENTY = 2**40


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that fit blocks of q8_0."""
    return tiny_model(tmp_path_factory.mktemp("wide") / "wide.gguf", more=HEADS)


def engine_of(path: Path, **fields: Any) -> closing[LlamaEngine]:
    settings = dataclasses.replace(SETTINGS, **fields)
    return closing(LlamaEngine(path, name="m", digest="sha256:0", settings=settings))


@pytest.fixture
def engine(wide: Path) -> Iterator[LlamaEngine]:
    with engine_of(wide) as engine:
        yield engine


async def say(engine: LlamaEngine, prompt: tuple[int, ...], scope: bytes | None, **fields: Any) -> Made:
    return await made(engine, prompt=prompt, max_tokens=4, sampling=GREEDY, logprobs=3, cache_scope=scope, **fields)


async def push_out(engine: LlamaEngine, scope: bytes = b"other") -> None:
    """As many other conversations as there are slots, and they push out what was there."""
    for number in range(engine.slots):
        await say(engine, tuple(7 + (number + 2) * i % 240 for i in range(200)), scope + bytes([number]))


def logprobs(answer: Made) -> Any:
    return np.array([[token.logprob, *(each.logprob for each in token.top)] for token in answer.tokens])


# It comes back, and is the same


@pytest.mark.parametrize(("kind", "flash"), [("f16", True), ("f16", False), ("q8_0", True)])  # q8_0 needs flash attention
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(PROMPT, LONGER, id="the next turn"),
        pytest.param(PROMPT, PROMPT, id="the same again"),
        pytest.param(LONGER, (*PROMPT[:200], *PROMPT[:60]), id="another end"),
        pytest.param((*LONGER, *LONGER)[:507], ((*LONGER, *LONGER)[:507]), id="a full context"),
    ],
)
async def test_a_return_says_what_it_would_have_said(
    wide: Path, kind: KvType, flash: bool, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with engine_of(wide, kv_type=kind, flash=flash, idle_caches=0) as engine:
        await say(engine, first, b"a")
        warm = await say(engine, second, b"a")  # still in its slot
    with engine_of(wide, kv_type=kind, flash=flash) as engine:
        await say(engine, first, b"a")
        await push_out(engine)
        assert engine.idle_caches.saved >= 1
        back = await say(engine, second, b"a")
        assert (engine.idle_caches.restored, engine.idle_caches.lost, engine.idle_caches.refused) == (1, 0, 0)
    assert back.ids == warm.ids
    assert logprobs(back) == pytest.approx(logprobs(warm), abs=0.02)
    common = next((i for i, (a, b) in enumerate(zip(first, second[:-1], strict=False)) if a != b), len(second) - 1)
    assert back.finish.cached_tokens == min(common, len(first), len(second) - 1) // BLOCK * BLOCK


async def test_only_its_own_scope_gets_it(engine: LlamaEngine) -> None:
    await say(engine, PROMPT, b"a")
    await push_out(engine)
    for scope in (b"b", b"", None):
        assert (await say(engine, PROMPT, scope)).finish.cached_tokens == 0
    assert engine.idle_caches.restored == 0
    assert (await say(engine, PROMPT, b"a")).finish.cached_tokens == len(PROMPT) // BLOCK * BLOCK


async def test_an_adapter_and_its_base_have_none_in_common(tiny: Path, tmp_path: Path) -> None:
    adapter = AdapterFile("x", tiny_lora(tmp_path / "x.gguf"), "sha256:1")
    with closing(LlamaEngine(tiny, name="m", digest="sha256:0", settings=SETTINGS, adapters=[adapter])) as engine:
        await say(engine, PROMPT, b"a")
        await push_out(engine)
        assert (await say(engine, PROMPT, b"a", adapter="x")).finish.cached_tokens == 0
        assert (await say(engine, PROMPT, b"a")).finish.cached_tokens == len(PROMPT) // BLOCK * BLOCK


async def test_answers_beside_it_are_not_changed(engine: LlamaEngine) -> None:
    alone = await made(engine, max_tokens=60, sampling=GREEDY)
    await say(engine, PROMPT, b"a")
    await push_out(engine)

    async def others() -> None:
        for number in range(6):
            await say(engine, PROMPT[number % 2 :], b"ab"[number % 2 : number % 2 + 1])
            await say(engine, LONGER[::-1], b"c")

    beside, _ = await asyncio.gather(made(engine, max_tokens=60, sampling=GREEDY), others())
    assert beside.ids == alone.ids
    assert engine.idle_caches.restored > 1


# It goes


async def test_it_goes_with_its_scope(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(wide) as engine:
        await say(engine, PROMPT, b"a")
        await push_out(engine)
        assert engine.idle_caches.bytes > 0
        monkeypatch.setattr(scope_ages, "SCOPE_LIFE", -0.9)
        await made(engine, max_tokens=1)  # so that it looks at its scopes
        await until(lambda: engine.idle_caches.bytes == 0)
        monkeypatch.undo()
        assert (await say(engine, PROMPT, b"a")).finish.cached_tokens == 0


async def test_a_closed_engine_has_no_copies_and_no_key(wide: Path) -> None:
    with engine_of(wide) as engine:
        await say(engine, PROMPT, b"a")
        await push_out(engine)
        vault = engine._context.vault
        assert vault is not None and vault._copies
    assert (vault._copies, vault._key, engine.idle_caches.bytes) == ({}, None, 0)


async def test_it_never_takes_more_than_it_may(wide: Path) -> None:
    one = ModelMetadata.read(wide).bytes_per_token * len(PROMPT)
    with engine_of(wide, idle_caches=3 * one) as engine:
        for number in range(12):
            await say(engine, tuple(9 + (number + 3) * i % 240 for i in range(len(PROMPT))), bytes([number]))
            assert engine.idle_caches.bytes <= 3 * one
        assert engine.idle_caches.saved > 6
        assert engine.idle_caches.refused == 0


# What fails, fails closed


class Slots:
    """A context with a vault, and a step of its own for each text."""

    def __init__(self, path: Path, *, most: int = 2**24, free: int = PLENTY) -> None:
        with closing(Tokenizer(path)) as tokenizer:
            self.model = Model(path, name="m", digest="", n_ctx=512, gpu=Gpu(layers=0), tokenizer=tokenizer)
        self.context = LlamaContext(self.model, EngineLimits(slots=2, context=512, cells=1024), Compute(1, True))
        self.free = free
        self.context.keep_copies(most, lambda: self.free)
        assert self.context.vault is not None
        self.vault: CacheVault = self.context.vault

    def read(self, slot: int, tokens: tuple[int, ...], start: int = 0) -> Any:
        self.context.execute(StepPlan((), (Segment(slot, start, tokens[start:], "t", True),), (), (), 0))
        return self.context.logits(1)[0].copy()

    def close(self) -> None:
        self.context.free()


@pytest.fixture
def slots(wide: Path) -> Iterator[Slots]:
    with closing(Slots(wide)) as slots:
        yield slots


def restoring(saved: Save, **fields: Any) -> Restore:
    return dataclasses.replace(
        Restore(1, saved.number, saved.length, saved.length - 1, "t", saved.scope, saved.adapter), **fields
    )


SAVE = Save(0, 1, len(PROMPT), b"a", None)


def test_logits_after_it_are_the_same(slots: Slots) -> None:
    expected = slots.read(0, PROMPT)
    slots.context.remember([Trim(0, len(PROMPT) - 1)])
    warm = slots.read(0, PROMPT, len(PROMPT) - 1)
    assert slots.context.remember([SAVE, Trim(0, 0), restoring(SAVE)]) == []
    restored = slots.read(1, PROMPT, len(PROMPT) - 1)
    assert (restored == warm).all(), "to the last bit: its cells are the same"
    assert restored == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "fields",
    [{"scope": b"b"}, {"scope": b""}, {"adapter": "x"}, {"adapter": ""}, {"number": 2}, {"length": 299, "keep": 298}],
    ids=str,
)
def test_it_opens_for_nobody_else(slots: Slots, fields: dict[str, Any]) -> None:
    slots.read(0, PROMPT)
    slots.context.remember([SAVE, dataclasses.replace(SAVE, number=3)])
    if "number" in fields:  # another one's bytes in its place
        slots.vault._copies[2] = slots.vault._copies[1]
    step = restoring(SAVE, **fields)
    assert slots.context.remember([step]) == [step]
    assert slots.vault.counts.lost == 1
    assert np.isfinite(slots.read(1, PROMPT)).all(), "the slot is empty, and reads from its beginning"


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_changed_bytes_do_not_open(slots: Slots, place: int) -> None:
    slots.read(0, PROMPT)
    slots.context.remember([SAVE])
    slots.vault._copies[1].pieces[0][place] ^= 1
    assert slots.context.remember([restoring(SAVE)]) == [restoring(SAVE)]


def test_the_plain_cells_are_not_in_it(slots: Slots) -> None:
    """Two copies of the same cells have nothing in common: no nonce is used twice."""
    slots.read(0, PROMPT)
    slots.context.remember([SAVE, dataclasses.replace(SAVE, number=2)])
    one, two = (np.frombuffer(slots.vault._copies[number].pieces[0], dtype=np.uint8) for number in (1, 2))
    assert len(one) == len(two) > 50_000
    assert (one == two).mean() < 0.01, "as by chance: one byte of 256"


@pytest.mark.parametrize("few", ["most", "free"])
def test_without_memory_there_is_no_copy(wide: Path, few: str) -> None:
    with closing(Slots(wide, most=1000) if few == "most" else Slots(wide, free=1000)) as slots:
        slots.read(0, PROMPT)
        assert slots.context.remember([SAVE, Trim(0, 0), restoring(SAVE)]) == [restoring(SAVE)]
        assert (slots.vault.counts.saved, slots.vault.counts.refused, slots.vault.counts.lost) == (0, 1, 1)
        assert np.isfinite(slots.read(1, PROMPT)).all()


async def test_an_answer_is_right_without_its_copy(wide: Path) -> None:
    with engine_of(wide) as engine:
        expected = await say(engine, LONGER, b"x")
        await say(engine, PROMPT, b"a")
        await push_out(engine)
        vault = engine._context.vault
        assert vault is not None
        for copy in vault._copies.values():
            copy.pieces[0][100] ^= 1
        back = await say(engine, LONGER, b"a")
        assert (back.ids, back.finish.cached_tokens, engine.idle_caches.lost) == (expected.ids, 0, 1)
        assert logprobs(back) == pytest.approx(logprobs(expected), abs=0.02)
        again = await say(engine, LONGER, b"a")
        assert again.finish.cached_tokens == len(LONGER) - 1, "it is in its slot"


# What has none


def test_what_is_derived(wide: Path) -> None:
    base = LlamaSettings(n_ctx=512, slots=2, threads=1)
    cell = ModelMetadata.read(wide).bytes_per_token
    room = wide.stat().st_size + OVERHEAD + 1024 * cell
    given = derive(wide, base, available=room + 2**20)
    assert given.idle_bytes == int(IDLE_SHARE * 2**20)
    assert given.limits.saved == given.idle_bytes // (cell + 32)
    assert derive(wide, base, available=room).limits.saved == 0
    for settings in (dataclasses.replace(base, unified=True), dataclasses.replace(base, idle_caches=0)):
        assert derive(wide, settings, available=room + 2**20).limits.saved == 0
    assert derive(wide, dataclasses.replace(base, idle_caches=2**20), available=room + 2**20).idle_bytes == 2**20
    with pytest.raises(SettingsError, match="idle_caches is 1048577 bytes"):
        derive(wide, dataclasses.replace(base, idle_caches=2**20 + 1), available=room + 2**20)
    with pytest.raises(SettingsError, match="remove unified"):
        derive(wide, dataclasses.replace(base, idle_caches=1, unified=True), available=room + 2**20)
