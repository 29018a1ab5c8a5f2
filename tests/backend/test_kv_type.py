"""The type of the cache's numbers: what it takes of the memory, what it changes, and where it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from backend.generating import GREEDY, made
from lacre.errors import SettingsError
from lacre_backend.engine.context import Compute, KvType, LlamaContext
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan
from lacre_backend.engine.sizing import MIN_N_CTX, OVERHEAD, derive
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.settings import ModelSettings
from parts.tiny_model import tiny_model

# Two heads of 32, because a block of q8_0 has 32 numbers
HEADS = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.rope.dimension_count": 32}
HALF = LlamaSettings(n_ctx=256, slots=2, threads=1, kv_type="q8_0")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "wide.gguf", more=HEADS)


def test_sizing_counts_the_bytes_of_the_type(wide: Path) -> None:
    facts = ModelMetadata.read(wide)
    assert facts.bytes_per_token == 2 * 2 * 1 * 64, "16 bits, two layers, one head, keys and values of 32"
    plain, half = (derive(wide, LlamaSettings(n_ctx=256, slots=2, kv_type=kind)) for kind in ("f16", "q8_0"))
    assert half.cache_bytes * 32 == plain.cache_bytes * 17
    room = OVERHEAD + wide.stat().st_size + half.cache_bytes
    assert derive(wide, HALF, available=room).limits.cells == 512
    with pytest.raises(SettingsError, match="fewer slots"):
        derive(wide, LlamaSettings(n_ctx=256, slots=2), available=room)
    quarter, same = (derive(wide, LlamaSettings(n_ctx=256, slots=2, kv_type=kind)) for kind in ("q4_0", "bf16"))
    assert quarter.cache_bytes * 32 == plain.cache_bytes * 9
    assert same.cache_bytes == plain.cache_bytes
    least = OVERHEAD + wide.stat().st_size + MIN_N_CTX * facts.bytes_per_token * 17 // 32
    assert derive(wide, LlamaSettings(kv_type="q8_0"), available=least).limits.context == MIN_N_CTX


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
async def test_an_engine_answers_from_it(wide: Path, kind: KvType) -> None:
    settings = dataclasses.replace(HALF, kv_type=kind)
    with contextlib.closing(LlamaEngine(wide, name="m", digest="sha256:0", settings=settings)) as engine:
        assert len((await made(engine, max_tokens=8, sampling=GREEDY)).ids) == 8


def test_it_changes_logits_a_little(wide: Path) -> None:
    """So the setting reaches llama.cpp: the cache has another precision."""
    prompt = tuple(range(10, 74))
    plan = StepPlan((), (Segment(0, 0, prompt, "t", True),), (), (), 0)
    rows = []
    with contextlib.closing(Tokenizer(wide)) as tokenizer:
        model = Model(wide, name="m", digest="", n_ctx=256, gpu=Gpu(layers=0), tokenizer=tokenizer)
    kinds: tuple[KvType, ...] = ("f16", "bf16", "q8_0", "q4_0")
    for kind in kinds:
        context = LlamaContext(model, EngineLimits(slots=1, context=256, cells=256), Compute(1, True, kind))
        context.execute(plan)
        rows.append(context.logits(1)[0].copy())
        context.free()
    apart = [abs(rows[0] - row).max() / abs(rows[0]).max() for row in rows[1:]]
    assert all(0 < each < most for each, most in zip(apart, (0.1, 0.1, 0.5), strict=True)), apart


def test_where_it_is_refused(tiny: Path, tmp_path: Path) -> None:
    for path, flash, message in (
        (tiny, False, "needs flash attention"),
        (tiny, None, "llama.cpp makes no q8_0 cache"),  # its heads have 16 numbers
        (tiny_model(tmp_path / "embeds.gguf", embeds=True), None, "no cache: remove `kv_type`"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_engine(ModelSettings(path=path, context=256, slots=1, threads=1, flash=flash, kv_type="q8_0"))
