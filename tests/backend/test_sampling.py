"""Sampling by numpy: the distribution that llama.cpp's order of stages gives, and the pace and size that engines choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre_backend.engine.model import ModelMetadata
from lacre_backend.engine.protocol import Sampling
from lacre_backend.engine.sampling import draw
from lacre_backend.engine.sizing import CPU_ROWS, DEFAULT_SLOTS, OVERHEAD, LlamaSettings, derive
from lacre_backend.models import gguf
from parts.tiny_model import tiny_model

unhurried = settings(deadline=None)  # the machine is shared


def expected(logits: Sequence[float], sampling: Sampling) -> np.ndarray:
    """By the rule, without any shortcut: top-p, min-p, then temperature."""
    values = np.asarray(logits, dtype=np.float64)
    p = np.exp(values - values.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(len(p), dtype=bool)
    within = 0.0
    for i in order:
        kept[i] = True
        within += p[i]
        if sampling.top_p < 1 and within >= sampling.top_p - 1e-7:
            break
    kept &= p >= sampling.min_p * p.max() * (1 - 1e-6)
    weights = np.where(kept, np.exp((values - values.max()) / sampling.temperature), 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.7), Sampling(min_p=0.2),
        Sampling(top_p=0.9, min_p=0.1, temperature=2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [5, 700])
def test_every_token_has_its_share_of_the_draws(sampling: Sampling, size: int) -> None:
    logits = np.random.default_rng(size).normal(0, 2, size).astype(np.float32)
    wanted = expected(logits, sampling)
    n = 4000  # evenly spaced: the inverse of a distribution, not a sample of it
    counts = np.zeros(size)
    for i in range(n):
        counts[draw(logits, sampling, (i + 0.5) / n)] += 1
    assert np.abs(counts / n - wanted).max() < 2 / n
    assert not counts[wanted == 0].any()


@unhurried
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=600),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([1e-9, 0.3, 1.0, 2.0]),
)
def test_a_draw_is_always_a_token_that_may_come(
    logits: list[float], uniform: float, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    row = np.array(logits, dtype=np.float32)
    token = draw(row, sampling, uniform)
    assert 0 <= token < len(logits)
    if temperature == 1e-9:
        assert row[token] >= row.max() - 1e-3
    if min_p > 0:
        assert np.exp(np.float64(row[token]) - row.max()) >= min_p * (1 - 1e-3)


# Size


def test_facts_are_read_without_the_weights() -> None:
    facts = ModelMetadata.read(gguf.find().path)
    assert (facts.architecture, facts.n_ctx_train, facts.n_embd, facts.pooling) == ("llama", 8192, 576, None)
    assert facts.bytes_per_token == 2 * 30 * 3 * (64 + 64)


def test_sizes_follow_the_memory(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf")
    facts = ModelMetadata.read(path)
    size = path.stat().st_size + OVERHEAD
    plenty = derive(path, LlamaSettings(), available=2**40)
    assert (plenty.limits.slots, plenty.limits.context) == (DEFAULT_SLOTS, facts.n_ctx_train)
    assert plenty.limits.multiple == CPU_ROWS
    assert plenty.cache_bytes == DEFAULT_SLOTS * facts.n_ctx_train * facts.bytes_per_token
    half = derive(path, LlamaSettings(), available=size + plenty.cache_bytes)
    assert half.limits.slots == DEFAULT_SLOTS // 2
    little = derive(path, LlamaSettings(), available=size + facts.n_ctx_train * facts.bytes_per_token)
    assert (little.limits.slots, little.limits.context) == (1, facts.n_ctx_train // 2)
    with pytest.raises(SettingsError, match="does not fit"):
        derive(path, LlamaSettings(), available=size)
    with pytest.raises(SettingsError, match="fewer slots"):
        derive(path, LlamaSettings(slots=64, n_ctx=4096), available=size + 2**20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_ctx": 3}, {"threads": 0}, {"threads": -1}, {"slots": 0}, {"slots": 257}, {"cells": 4096},
        {"unified": True, "cells": 10},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        derive(tiny_model(tmp_path / "tiny.gguf"), LlamaSettings(**wrong), available=2**40)  # type: ignore[arg-type]
