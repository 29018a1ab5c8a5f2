"""What is llama.cpp's own: loading, sampling, threads, silence."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import DEFAULT_N_CTX
from lacre_backend.engine.plan import EngineLimits
from lacre_backend.engine.protocol import Engine, Finish, PromptProgress, Sampling, Task, Token
from lacre_backend.models import gguf

MakeTask = Callable[..., Task]
Run = Callable[..., Any]
GREEDY = Sampling(temperature=0)
CHUNK = EngineLimits(slots=1, context=1, cells=1).chunk


def start(*, settings: LlamaSettings | None = None) -> LlamaEngine:
    file = gguf.find()
    return LlamaEngine(file.path, name=file.name, digest=file.digest, settings=settings)


def test_facts_of_the_default_model(llama: LlamaEngine) -> None:
    model = llama.model
    assert model.name == "smollm2-135m"
    assert (model.n_ctx, model.n_vocab, model.add_bos) == (1024, 49152, False)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= {token.text for token in model.control_tokens}
    assert model.eos is not None
    assert model.eos.text == "<|im_end|>"


async def test_default_context_and_threads(make_task: MakeTask, run: Run) -> None:
    engine = start()
    try:
        assert engine.model.n_ctx == DEFAULT_N_CTX
        _, finish = await run(engine, make_task(engine, max_tokens=2))
        assert finish.completion_tokens == 2
    finally:
        engine.close()


@pytest.mark.parametrize("settings", [LlamaSettings(n_ctx=3), LlamaSettings(threads=-1)])
def test_settings_that_make_no_sense(settings: LlamaSettings) -> None:
    with pytest.raises(SettingsError):
        start(settings=settings)


def test_a_file_that_only_looks_like_a_model(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(gguf.find().path.read_bytes()[:100_000])
    with pytest.raises(SettingsError, match="cannot load"):
        LlamaEngine(path, name="broken", digest="sha256:")
    assert capfd.readouterr() == ("", "")


async def test_llama_cpp_writes_nothing(make_task: MakeTask, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    engine = start(settings=LlamaSettings(n_ctx=256))
    await run(engine, make_task(engine, "canary in the prompt", max_tokens=4))
    engine.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
async def test_prefill_in_chunks_is_prefill_at_once(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    """Logprobs at the end of a prompt of several chunks, against those of the same prompt in an engine of larger steps."""
    prompt = tuple(llama.tokenize("The sea is wide, and the sky is blue. " * 60)[: 2 * CHUNK + 7])
    (chunked,), _ = await run(llama, make_task(llama, prompt=prompt, max_tokens=1, sampling=GREEDY, logprobs=5))
    again, _ = await run(llama, make_task(llama, prompt=prompt, max_tokens=3, sampling=GREEDY, logprobs=5))
    assert chunked == again[0]
    # The second token's prefill-free logprobs equal those of a prompt that already holds the first.
    (longer,), _ = await run(llama, make_task(llama, prompt=(*prompt, chunked.id), max_tokens=1, sampling=GREEDY, logprobs=5))
    assert longer.id == again[1].id
    assert longer.logprob == pytest.approx(again[1].logprob, abs=0.25)


async def test_nothing_of_one_request_is_left_for_the_next(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    alone, _ = await run(llama, make_task(llama, "One two three", max_tokens=4, sampling=GREEDY, logprobs=3))
    await run(llama, make_task(llama, "Something else altogether, and longer. " * 20, max_tokens=4))
    after, finish = await run(llama, make_task(llama, "One two three", max_tokens=4, sampling=GREEDY, logprobs=3))
    assert after == alone
    assert finish.cached_tokens == 0


async def test_logprobs_are_a_distribution(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    (token,), _ = await run(llama, make_task(llama, max_tokens=1, logprobs=llama.model.n_vocab))
    assert math.fsum(math.exp(alternative.logprob) for alternative in token.top) == pytest.approx(1, abs=1e-4)
    assert len({alternative.id for alternative in token.top}) == llama.model.n_vocab


async def test_logit_bias_chooses(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    (wanted,) = llama.tokenize(" zebra")[:1]
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, logit_bias={wanted: 100.0})
        tokens, _ = await run(llama, make_task(llama, max_tokens=3, sampling=sampling))
        assert [token.id for token in tokens] == [wanted] * 3


async def test_penalties_stop_repetition(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    prompt = "go go go go go go go go go go"
    plain, _ = await run(llama, make_task(llama, prompt, max_tokens=16, sampling=GREEDY))
    sampling = Sampling(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, repeat_penalty=1.5)
    penalised, _ = await run(llama, make_task(llama, prompt, max_tokens=16, sampling=sampling))
    assert len({token.id for token in penalised}) > len({token.id for token in plain})


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0), Sampling(temperature=1e-4)])
async def test_narrow_sampling_is_greedy(llama: LlamaEngine, make_task: MakeTask, run: Run, sampling: Sampling) -> None:
    greedy, _ = await run(llama, make_task(llama, max_tokens=6, sampling=GREEDY))
    narrow, _ = await run(llama, make_task(llama, max_tokens=6, sampling=sampling))
    assert [token.id for token in narrow] == [token.id for token in greedy]


async def test_unseeded_sampling_differs(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    answers = set()
    for _ in range(4):
        tokens, _ = await run(llama, make_task(llama, max_tokens=8, sampling=Sampling(temperature=2.0)))
        answers.add(tuple(token.id for token in tokens))
    assert len(answers) > 1


async def test_cancel_within_the_prefill(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    prompt = tuple(np.resize(llama.tokenize("wave after wave after "), 4 * CHUNK - 30).tolist())
    task = make_task(llama, prompt=prompt)
    stream = llama.submit(task)
    await asyncio.sleep(0.02)
    llama.cancel(task.id)
    *read, finish = [event async for event in stream]
    assert finish == Finish("cancelled", len(prompt), 0, 0)
    assert all(isinstance(event, PromptProgress) for event in read)
    assert len(read) < 3, "the whole prompt was read"


async def test_cancel_takes_one_step(llama: LlamaEngine, make_task: MakeTask) -> None:
    task = make_task(llama, max_tokens=800)
    stream = llama.submit(task)
    for _ in range(3):
        await anext(stream)
    llama.cancel(task.id)
    rest = [event async for event in stream]
    assert isinstance(rest[-1], Finish)
    assert len(rest) <= 3, "at most the step under way and what was on its way"


async def test_a_waiting_task_is_cancelled_at_once(llama: LlamaEngine, make_task: MakeTask) -> None:
    running = [make_task(llama, max_tokens=600) for _ in range(llama.slots)]
    waiting = make_task(llama)
    streams = [llama.submit(task) for task in running]
    last = llama.submit(waiting)
    await anext(streams[0])
    llama.cancel(waiting.id)
    assert await anext(last) == Finish("cancelled", len(waiting.prompt), 0, 0)
    assert not isinstance(await anext(streams[0]), Finish), "it waited for a slot"
    for task, stream in zip(running, streams, strict=True):
        llama.cancel(task.id)
        async for _ in stream:
            pass


async def test_first_come_first_served(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    ended: list[int] = []

    async def one(i: int) -> None:
        await run(llama, make_task(llama, max_tokens=3))
        ended.append(i)

    async with asyncio.TaskGroup() as group:
        for i in range(5):
            group.create_task(one(i))
    assert ended == [0, 1, 2, 3, 4]


def test_a_loop_that_is_gone_does_not_stop_the_engine(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    async def leave() -> None:
        await anext(llama.submit(make_task(llama, max_tokens=900)))

    before = llama.computed_tokens
    asyncio.run(leave())
    _, finish = asyncio.run(run(llama, make_task(llama, max_tokens=2)))
    assert finish.completion_tokens == 2
    assert llama.computed_tokens - before < 900, "the tokens that nobody reads were all made first"


def test_tasks_from_several_loops(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    results: list[Finish] = []

    def work() -> None:
        results.append(asyncio.run(run(llama, make_task(llama, max_tokens=3)))[1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [finish.completion_tokens for finish in results] == [3] * 4


async def test_tokens_arrive_while_others_are_made(llama: LlamaEngine, make_task: MakeTask) -> None:
    task = make_task(llama, max_tokens=120)
    made = [llama.computed_tokens async for event in llama.submit(task) if isinstance(event, Token)]
    assert made[0] < made[-1], "the first came when all were made"


async def test_long_texts_are_tokenized_without_harm(llama: LlamaEngine) -> None:
    def tokenize(engine: Engine) -> None:
        for text in ("a" * 200_000, "9" * 200_000, " " * 200_000, "é漢😀" * 20_000, "<|im_" * 40_000):
            assert engine.tokenize(text)

    await asyncio.to_thread(tokenize, llama)
    assert llama.tokenize("") == []
