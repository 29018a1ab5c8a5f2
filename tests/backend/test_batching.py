"""Many sequences at once: the right tokens, nobody else's cache, no slot or cell left held."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import math
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import pytest

from backend.generating import GREEDY, made, make_task, run
from backend.posting import post
from lacre.asgi import Usage
from lacre_backend.api.app import create_app
from lacre_backend.api.run import GenerationRuns
from lacre_backend.engine import scope_ages
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.protocol import EngineError, Event, Finish, PromptProgress, Sampling, Task, TaskRefused, Token
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models import gguf

SPLIT = LlamaSettings(n_ctx=512, threads=1, slots=16)
UNIFIED = dataclasses.replace(SPLIT, unified=True, cells=16 * 160)


def engine_of(path: Path, settings: LlamaSettings) -> contextlib.closing[LlamaEngine]:
    return contextlib.closing(LlamaEngine(path, name="m", digest="sha256:0", settings=settings))


@pytest.fixture(params=[SPLIT, UNIFIED], ids=["split", "unified"])
def tiny_engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[LlamaEngine]:
    with engine_of(tiny, request.param) as engine:
        yield engine


# The right tokens


class Reference:
    """One sequence in a context of its own: the logits at each position of a text."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer(path)
        self.model = Model(path, name="m", digest="", n_ctx=512, gpu=Gpu(layers=0), tokenizer=self.tokenizer)
        params = L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.no_perf = True
        self.context = L.llama_init_from_model(self.model.pointer, params)

    def logits(self, tokens: list[int], begin: int) -> Any:
        """Rows for the positions from `begin` on."""
        L.llama_memory_clear(L.llama_get_memory(self.context), False)
        batch = L.llama_batch_init(512, 0, 1)
        try:
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i >= begin
                batch.seq_id[i][0] = 0
            batch.n_tokens = len(tokens)
            assert L.llama_decode(self.context, batch) == 0
            rows = len(tokens) - begin
            return np.ctypeslib.as_array(L.llama_get_logits(self.context), (rows, self.model.n_vocab)).copy()
        finally:
            L.llama_batch_free(batch)

    def close(self) -> None:
        L.llama_free(self.context)
        self.tokenizer.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    reference = Reference(gguf.find().path)
    yield reference
    reference.close()


@pytest.mark.parametrize(
    ("settings", "scope", "ships"),
    [
        pytest.param(SPLIT, b"one scope", 5, id="split, reuse, few", marks=pytest.mark.slow),
        pytest.param(UNIFIED, b"one scope", 5, id="unified, reuse, few"),
        pytest.param(SPLIT, None, 16, id="split, no reuse", marks=pytest.mark.slow),
        pytest.param(UNIFIED, b"one scope", 16, id="unified, reuse", marks=pytest.mark.slow),
        pytest.param(SPLIT, b"one scope", 16, id="split, reuse", marks=pytest.mark.slow),
        pytest.param(UNIFIED, None, 16, id="unified, no reuse", marks=pytest.mark.slow),
    ],
)
async def test_batched_tokens_are_those_of_one_sequence(
    reference: Reference, settings: LlamaSettings, scope: bytes | None, ships: int
) -> None:
    """Teacher-forced: each greedy token's logit is within 0.25 of the best one of a single sequence at that position."""
    common = "The harbour master wrote into his book, in a small and even hand, all that he had seen that day. "
    prompts = [common * 2 + f"Ship number {i} carried {'salt and oil ' * (i % 5)}" for i in range(ships)]
    with engine_of(gguf.find().path, settings) as engine:
        if scope:
            await made(engine, prompts[0], max_tokens=2, sampling=GREEDY, cache_scope=scope)
        tasks = [make_task(engine, text, 12, sampling=GREEDY, endless=False, cache_scope=scope) for text in prompts]
        results = await asyncio.gather(*(run(engine, task) for task in tasks))
    assert any(finish.cached_tokens for _, finish in results) == (scope is not None)
    for task, (tokens, _) in zip(tasks, results, strict=True):
        ids = [token.id for token in tokens]
        rows = reference.logits([*task.prompt, *ids], len(task.prompt) - 1)[: len(ids)]
        short = rows.max(axis=1) - rows[range(len(ids)), ids]
        assert short.max() <= 0.25, short


@pytest.mark.slow
async def test_an_answer_goes_on_with_the_very_logits_it_would_have_had(llama: LlamaEngine) -> None:
    """Wherever it is cut: its tokens are read again by the kernel that they were generated by, to the last bit."""
    whole, _ = await made(llama, max_tokens=150, sampling=GREEDY, logprobs=0)
    said = [(token.id, token.logprob) for token in whole]
    for cut in (20, 80, 130):
        begun = tuple(token.id for token in whole[:cut])
        rest, _ = await made(llama, max_tokens=20, sampling=GREEDY, logprobs=0, begun=begun)
        assert [(token.id, token.logprob) for token in rest] == said[cut : cut + 20]


async def test_ways_of_sampling_side_by_side(tiny_engine: LlamaEngine) -> None:
    """Greedy ones are not disturbed by their neighbours' bias, grammar, penalties or temperature."""
    alone = await made(tiny_engine, "abc", 10, sampling=GREEDY, endless=False, logprobs=2)
    others = [
        Sampling(temperature=1.5, logit_bias={100: 30.0}),
        Sampling(grammar='start: "yes" | "no"'),
        Sampling(frequency_penalty=1.5, temperature=0),
        Sampling(temperature=0.8, top_p=0.9, min_p=0.05),
        Sampling(top_k=3, seed=1),
    ]
    biased, spelled, *_, greedy = await asyncio.gather(
        *(made(tiny_engine, "abd", 10, sampling=sampling, endless=False) for sampling in others),
        made(tiny_engine, "abc", 10, sampling=GREEDY, endless=False, logprobs=2),
    )
    assert "".join(token.text for token in spelled.tokens) in ("yes", "no")
    assert (biased.ids, greedy.ids) == ([100] * 10, alone.ids)
    assert [token.logprob for token in greedy.tokens] == pytest.approx([token.logprob for token in alone.tokens], abs=0.02)


# Prompts that take several steps


async def test_a_long_prompt_says_how_far_it_is_read(tiny_engine: LlamaEngine) -> None:
    task = make_task(tiny_engine, prompt=tuple(tiny_engine.tokenize("x" * 480)), max_tokens=2)
    events = [event async for event in tiny_engine.submit(task)]
    read = [event.prompt_tokens for event in events if isinstance(event, PromptProgress)]
    assert read
    assert read == sorted(set(read))
    assert 0 < read[0] <= read[-1] < 480
    assert [type(event) for event in events] == [*[PromptProgress] * len(read), Token, Token, Finish]


async def test_what_was_read_counts_before_the_first_token(tiny_engine: LlamaEngine) -> None:
    """Whoever leaves while a long prompt is read pays for what was read of it."""
    seen: set[int] = set()

    class Watched(Usage):
        def __setattr__(self, name: str, value: int) -> None:
            super().__setattr__(name, value)
            if name == "prompt_tokens":
                seen.add(value)

    prompt, usage = tuple(tiny_engine.tokenize("x" * 480)), Watched()
    generation = GenerationRuns(tiny_engine, [make_task(tiny_engine, prompt=prompt, max_tokens=1)], 1, usage, "prompt")
    generation.submit()
    events = generation.events()
    await anext(events)
    assert any(0 < tokens < 480 for tokens in seen), seen
    assert (usage.prompt_tokens, usage.completion_tokens) == (480, 1)
    await events.aclose()
    generation.close()


# The cache


async def test_a_prefix_cached_by_another_scope_changes_nothing(tiny_engine: LlamaEngine) -> None:
    prompt, found = tuple(tiny_engine.tokenize("x" * 200)), []
    for scope in (b"a", b"b", None, None, b"a"):
        before = tiny_engine.computed_tokens
        _, finish = await made(tiny_engine, prompt=prompt, max_tokens=1, cache_scope=scope)
        found.append((finish.cached_tokens, tiny_engine.computed_tokens - before))
    assert found == [*[(0, 200)] * 4, (199, 1)]


async def test_what_is_cached_for_a_scope_expires(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope_ages, "SCOPE_LIFE", -0.9)
    with engine_of(tiny, SPLIT) as engine:
        await made(engine, "z" * 100, 2, cache_scope=b"a")
        for _ in range(100):
            if engine.held == (0, 0):
                break
            await asyncio.sleep(0.02)
        assert engine.held == (0, 0)


# Slots and cells


async def drain(engine: LlamaEngine, task: Task, leave_after: int | None) -> str:
    seen: list[Event] = []
    try:
        async for event in engine.submit(task):
            seen.append(event)
            if leave_after is not None and len(seen) == leave_after:
                engine.cancel(task.id)
    except EngineError:
        return "failed"
    except TaskRefused:
        return "refused"
    assert isinstance(seen[-1], Finish)
    assert sum(isinstance(event, Finish) for event in seen) == 1
    return seen[-1].reason


def resident() -> int:
    """Bytes, after what Python and the allocator can give back was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def twice(engine: LlamaEngine, calls: Callable[[], Iterable[Awaitable[str]]]) -> Counter[str]:
    """What all of them came to; the second time they need no more memory, and no slot and no cell is left held."""
    await asyncio.gather(*calls())
    before = resident()
    counts = Counter(await asyncio.gather(*calls()))
    assert resident() <= 1.05 * before
    assert engine.held[0] == 0
    for scope in list(engine._scheduler.scopes):
        engine._scheduler.forget(scope)
    assert engine.held == (0, 0)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("tiny_engine", [pytest.param(SPLIT, id="split"), pytest.param(UNIFIED, id="unified")], indirect=True)
async def test_500_mixed_tasks(tiny_engine: LlamaEngine) -> None:
    choose = random.Random(4)

    def tasks() -> Iterator[tuple[Task, int | None]]:
        for i in range(500):
            prompt = tuple(choose.randrange(3, 259) for _ in range(choose.choice([3, 20, 120, 400])))
            scope = choose.choice([None, b"a", b"b", secrets.token_bytes(8)])
            task = make_task(tiny_engine, prompt=prompt, max_tokens=choose.choice([1, 8, 40]), cache_scope=scope)
            match i % 10:
                case 0:  # a refusal
                    yield dataclasses.replace(task, prompt=(*prompt, 10**6)), None
                case 1:  # an error in the middle: nothing that the grammar admits is left
                    sampling = Sampling(grammar='start: "a"', logit_bias={ord("a") + 3: -math.inf}, top_k=1, seed=1)
                    yield dataclasses.replace(task, sampling=sampling), None
                case 2 | 3:  # cancelled
                    yield task, choose.choice([1, 3])
                case 4:  # out of time
                    yield dataclasses.replace(task, time_limit=0.0), None
                case _:
                    yield task, None

    counts = await twice(tiny_engine, lambda: [drain(tiny_engine, task, leave) for task, leave in tasks()])
    assert sum(counts.values()) == 500
    assert counts["refused"] == 50
    assert counts["cancelled"] > 0


@pytest.mark.slow
async def test_500_mixed_requests(tiny_engine: LlamaEngine) -> None:
    """Through the API, all at once: whole and streamed, long and short, three choices, refused, broken off, abandoned."""
    choose = random.Random(5)
    app = create_app([tiny_engine])

    async def one(i: int) -> str:
        body: dict[str, Any] = {
            "model": "m",
            "prompt": "".join(choose.choices("abc xyz", k=choose.choice([3, 20, 120, 400]))),
            "max_tokens": choose.choice([1, 8, 40]),
            "stream": choose.random() < 0.5,
            "n": 3 if i % 4 == 0 else 1,
        }
        leave_after: int | None = None
        match i % 10:
            case 0:
                body["prompt"] = "x" * 600  # longer than the context
            case 1:
                body["best_of"] = 7  # not supported
            case 2 | 3:
                leave_after = choose.choice([1, 3])
                body |= {"stream": True, "prompt": "abc", "max_tokens": 500}  # what nobody hears must not be made
            case 4:
                body["stop"] = ["a"]
        salt = choose.choice([(), ((b"lacre-cache-salt", b"shared"),), ((b"lacre-cache-salt", secrets.token_hex(8).encode()),)])
        reply = await post(app, "/v1/completions", body, leave_after=leave_after, headers=salt)
        if reply.status == 200 and leave_after is None:
            answers = reply.events() if body["stream"] else [reply.json()]
            ended = [choice["index"] for answer in answers for choice in answer["choices"] if choice["finish_reason"]]
            assert sorted(ended) == list(range(body["n"])), "each choice ends once"
        return "left" if leave_after is not None else str(reply.status)

    assert await twice(tiny_engine, lambda: map(one, range(500))) == {"200": 300, "400": 100, "left": 100}


async def test_more_than_the_cells_hold(tiny: Path) -> None:
    """Tasks that outgrow a unified cache go back and come again; none fails, and none loses or repeats a token."""
    settings = LlamaSettings(n_ctx=256, threads=1, slots=8, unified=True, cells=600)
    with engine_of(tiny, settings) as engine:
        assert engine.slots == 8
        tasks = [make_task(engine, f"{i} " * 10, 150, sampling=GREEDY) for i in range(8)]
        together = await asyncio.gather(*(run(engine, task) for task in tasks))
        assert [finish.completion_tokens for _, finish in together] == [150] * 8
        computed = sum(len(task.prompt) + 149 for task in tasks)
        assert engine.computed_tokens > computed, "the test needs a preemption"
