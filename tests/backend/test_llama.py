"""What is llama.cpp's own: loading, sampling, threads, silence."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, made, make_task
from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import DEFAULT_N_CTX
from lacre_backend.engine.plan import EngineLimits
from lacre_backend.engine.protocol import Finish, PromptProgress, Sampling, Token
from lacre_backend.models import gguf

CHUNK = EngineLimits(slots=1, context=1, cells=1).chunk


def test_facts_of_the_default_model(llama: LlamaEngine) -> None:
    model = llama.model
    assert model.name == "smollm2-135m"
    assert (model.n_ctx, model.n_vocab, model.add_bos) == (1024, 49152, False)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= {token.text for token in model.control_tokens}
    assert model.eos is not None
    assert model.eos.text == "<|im_end|>"


def test_a_file_that_only_looks_like_a_model(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(gguf.find().path.read_bytes()[:100_000])
    with pytest.raises(SettingsError, match="cannot load"):
        LlamaEngine(path, name="broken", digest="sha256:")
    assert capfd.readouterr() == ("", "")


async def test_defaults_are_enough_and_llama_cpp_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(LlamaEngine(gguf.find().path, name="m", digest="")) as engine:
        assert engine.model.n_ctx == DEFAULT_N_CTX
        assert (await made(engine, "canary in the prompt", 2)).finish.completion_tokens == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "turns"), [({}, "1000"), ({"GOMP_SPINCOUNT": "70"}, "70"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
@pytest.mark.parametrize("module", ["lacre_backend.engine.model", "lacre_backend.workshop.rewriting"])
def test_threads_that_wait_leave_their_core_soon(module: str, given: dict[str, str], turns: str) -> None:
    """libgomp tells with which values it was loaded."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-P", "-c", f"import {module}"]
    env = {**clean, **given, "OMP_DISPLAY_ENV": "verbose"}
    told = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stderr
    if "GOMP_" not in told:
        pytest.skip("this llama.cpp was built without GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{turns}'" in told


@pytest.mark.slow
async def test_prefill_in_chunks_is_prefill_at_once(llama: LlamaEngine) -> None:
    """Logprobs at the end of a prompt of several chunks, against those of the same prompt in an engine of larger steps."""
    prompt = tuple(llama.tokenize("The sea is wide, and the sky is blue. " * 60)[: 2 * CHUNK + 7])
    (chunked,), _ = await made(llama, prompt=prompt, max_tokens=1, sampling=GREEDY, logprobs=5)
    again, _ = await made(llama, prompt=prompt, max_tokens=3, sampling=GREEDY, logprobs=5)
    assert chunked == again[0]
    # The second token's prefill-free logprobs equal those of a prompt that already holds the first.
    (longer,), _ = await made(llama, prompt=(*prompt, chunked.id), max_tokens=1, sampling=GREEDY, logprobs=5)
    assert longer.id == again[1].id
    assert longer.logprob == pytest.approx(again[1].logprob, abs=0.25)


async def test_logprobs_are_a_distribution(llama: LlamaEngine) -> None:
    (token,), _ = await made(llama, max_tokens=1, logprobs=llama.model.n_vocab)
    assert math.fsum(math.exp(alternative.logprob) for alternative in token.top) == pytest.approx(1, abs=1e-4)
    assert len({alternative.id for alternative in token.top}) == llama.model.n_vocab


async def test_penalties_stop_repetition(llama: LlamaEngine) -> None:
    penalties = Sampling(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, repeat_penalty=1.5)
    plain, penalised = [await made(llama, "go " * 10, 16, sampling=sampling) for sampling in (GREEDY, penalties)]
    assert len(set(penalised.ids)) > len(set(plain.ids))


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0), Sampling(temperature=1e-4)])
async def test_narrow_sampling_is_greedy(llama: LlamaEngine, sampling: Sampling) -> None:
    greedy, narrow = [await made(llama, max_tokens=6, sampling=each) for each in (GREEDY, sampling)]
    assert narrow.ids == greedy.ids


async def test_unseeded_sampling_differs(llama: LlamaEngine) -> None:
    answers = [await made(llama, max_tokens=8, sampling=Sampling(temperature=2.0)) for _ in range(4)]
    assert len({tuple(answer.ids) for answer in answers}) > 1


async def test_cancel_within_the_prefill(llama: LlamaEngine) -> None:
    prompt = tuple(np.resize(llama.tokenize("wave after wave after "), 4 * CHUNK - 30).tolist())
    task = make_task(llama, prompt=prompt)
    stream = llama.submit(task)
    await asyncio.sleep(0.02)
    llama.cancel(task.id)
    *read, finish = [event async for event in stream]
    assert finish == Finish("cancelled", len(prompt), 0, 0)
    assert all(isinstance(event, PromptProgress) for event in read)
    assert len(read) < 3, "the whole prompt was read"


def test_a_loop_that_is_gone_does_not_stop_the_engine(llama: LlamaEngine) -> None:
    async def leave() -> None:
        await anext(llama.submit(make_task(llama, max_tokens=900)))

    before = llama.computed_tokens
    asyncio.run(leave())
    _, finish = asyncio.run(made(llama, max_tokens=2))
    assert finish.completion_tokens == 2
    assert llama.computed_tokens - before < 900, "the tokens that nobody reads were all made first"


def test_tasks_from_several_loops(llama: LlamaEngine) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: asyncio.run(made(llama, max_tokens=3)), range(4)))
    assert [finish.completion_tokens for _, finish in results] == [3] * 4


async def test_tokens_arrive_while_others_are_made(llama: LlamaEngine) -> None:
    task = make_task(llama, max_tokens=120)
    made = [llama.computed_tokens async for event in llama.submit(task) if isinstance(event, Token)]
    assert made[0] < made[-1], "the first came when all were made"
