"""The sizes of steps, chunks and bursts: what follows from a model's table, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import llama_cpp as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.generating import GREEDY, made
from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, SplitMode
from lacre_backend.engine.pace import PREFILL
from lacre_backend.engine.plan import BURST, CHUNK, SHARE, STEP
from lacre_backend.engine.sizing import MAX_SLOTS, derive
from lacre_backend.engine_process.loading import load_engine, options
from lacre_backend.settings import ModelSettings
from parts.tiny_model import tiny_model


def test_a_table_becomes_the_engines_limits(tiny: Path) -> None:
    table = ModelSettings(path=tiny, context=256, slots=4, n_batch=128, n_ubatch=32, chunk=96, burst=24, prefill=0.4)
    wanted = options(table)
    assert (wanted.prefill, wanted.n_ubatch) == (0.4, 32)
    limits = derive(tiny, wanted).limits
    assert (limits.step, limits.chunk, limits.burst) == (128, 96, 24)
    plain = derive(tiny, options(ModelSettings(path=tiny, context=256, slots=4))).limits
    assert (plain.step, plain.chunk, plain.burst, plain.share) == (STEP, CHUNK, BURST, SHARE)
    assert options(ModelSettings(path=tiny)).prefill == PREFILL


sizes = st.none() | st.integers(1, 3000)


@settings(deadline=None, max_examples=200)
@given(slots=st.integers(1, MAX_SLOTS), n_batch=sizes, n_ubatch=sizes, chunk=sizes, burst=sizes)
def test_any_sizes_are_limits_or_refused_by_name(slots: int, **given: int | None) -> None:
    """n_batch, n_ubatch, chunk and burst. A smaller n_batch than the default leaves smaller chunks and bursts."""
    wanted = LlamaSettings(n_ctx=64, slots=slots, threads=1, **given)
    try:
        limits = derive(TINY, wanted).limits
    except SettingsError as refused:
        assert "n_batch" in str(refused)
        return
    assert all(value is None or getattr(limits, name) == value for name, value in given.items() if name in ("chunk", "burst"))
    assert given["n_batch"] in (None, limits.step)
    assert 1 <= limits.most <= limits.chunk
    assert given["n_ubatch"] is None or given["n_ubatch"] <= limits.step


TINY = Path()


@pytest.fixture(autouse=True, scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    globals()["TINY"] = tiny_model(tmp_path_factory.mktemp("steps") / "tiny.gguf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_batch": 3, "slots": 4}, "n_batch is 3. With 4 slots"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"burst": 20_000}, "burst is 20000"),
        ({"n_batch": 64, "chunk": 65}, "set 65 or more"),
        ({"n_batch": 64, "burst": 60, "slots": 4}, "set 65 or more"),
        ({"n_batch": 64, "n_ubatch": 128}, "set n_ubatch to 64 or less"),
        ({"prefill": 0.0}, "prefill is 0.0"),
        ({"prefill": 1.0}, "prefill is 1.0"),
    ],
)
def test_sizes_that_contradict_each_other(tiny: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        derive(tiny, LlamaSettings(n_ctx=64, **{"slots": 2, **wrong}))


async def test_an_engine_answers_with_small_steps(tiny: Path) -> None:
    """A step of 16 tokens that llama.cpp computes by fours reads a prompt of 100."""
    small = LlamaSettings(n_ctx=256, slots=2, threads=1, n_batch=16, n_ubatch=4)
    with contextlib.closing(LlamaEngine(tiny, name="m", digest="sha256:0", settings=small)) as engine:
        answers = [await made(engine, prompt=(10,) * 100, max_tokens=8, sampling=GREEDY)]
        steps = engine.steps
    assert len(answers[0].ids) == 8
    assert steps >= 7 + 100 // 16


@pytest.mark.parametrize("split_mode", ["none", "layer", "row"])
async def test_every_split_mode_loads_without_a_gpu(tiny: Path, split_mode: SplitMode) -> None:
    wanted = LlamaSettings(n_ctx=64, slots=1, threads=1, gpu=Gpu(split_mode=split_mode))
    with contextlib.closing(LlamaEngine(tiny, name="m", digest="sha256:0", settings=wanted)) as engine:
        assert len((await made(engine, max_tokens=2, sampling=GREEDY)).ids) == 2


@pytest.mark.skipif(L.llama_supports_gpu_offload(), reason="this llama.cpp was built for a GPU")
def test_split_mode_tensor_needs_one(tiny: Path) -> None:
    with pytest.raises(SettingsError, match=r'needs a GPU, and .*: set "layer"'):
        load_engine(ModelSettings(path=tiny, context=64, slots=1, threads=1, split_mode="tensor"))


@pytest.mark.parametrize("key", ["n_batch", "n_ubatch", "chunk", "burst"])
def test_an_encoder_has_no_such_steps(tmp_path: Path, key: str) -> None:
    path = tiny_model(tmp_path / "embeds.gguf", embeds=True)
    with pytest.raises(SettingsError, match="does not generate: remove"):
        load_engine(ModelSettings.model_validate({"path": path, key: 64}))
