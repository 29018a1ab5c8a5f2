"""Several choices of one request: the prompt is computed once and billed once, and each choice says what it would say alone."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from backend.posting import post
from lacre.asgi import Usage
from lacre_backend.api.app import create_app
from lacre_backend.api.run import GenerationRuns
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import Finish, Sampling, Task, TaskRefused, Token
from parts.tiny_model import tiny_model, tiny_recurrent_model

SLOTS = 4
SPLIT = LlamaSettings(n_ctx=512, threads=1, slots=SLOTS)
UNIFIED = dataclasses.replace(SPLIT, unified=True, cells=SLOTS * 300)
PROMPT = tuple(itertools.islice(itertools.cycle(range(3, 250)), 150))
END = 2  # what ends an answer
NEVER_ENDS = {END: -1000.0}
_ids = itertools.count()


@pytest.fixture(scope="module", params=["split", "unified", "recurrent"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    make = tiny_recurrent_model if request.param == "recurrent" else tiny_model
    path = make(tmp_path_factory.mktemp("model") / "tiny.gguf")
    engine = LlamaEngine(path, name="m", digest="sha256:0", settings=UNIFIED if request.param == "unified" else SPLIT)
    yield engine
    engine.close()


def task(max_tokens: int = 3, sampling: Sampling | None = None, **fields: Any) -> Task:
    sampling = dataclasses.replace(sampling or Sampling(temperature=1, seed=5), logit_bias=NEVER_ENDS)
    return Task(f"t{next(_ids)}", fields.pop("prompt", PROMPT), max_tokens, sampling=sampling, **fields)


async def choices(engine: LlamaEngine, task: Task, n: int) -> tuple[dict[int, list[Token]], Usage, int]:
    """The tokens of each choice, what is billed, and how many tokens were computed."""
    before, usage = engine.computed_tokens, Usage()
    generation = GenerationRuns(engine, [task], n, usage, "prompt")
    generation.submit()
    tokens: dict[int, list[Token]] = {i: [] for i in range(n)}
    async for index, event in generation.events():
        if isinstance(event, Token):
            tokens[index].append(event)
        else:
            assert isinstance(event, Finish)
            assert event.prompt_tokens == len(task.sequence)
    generation.close()
    assert len(engine._rows) == 0
    return tokens, usage, engine.computed_tokens - before


def reads(engine: LlamaEngine, prompt: int, n: int) -> list[int]:
    """Tokens that may be computed of a prompt of `n` choices. A state that cannot be cut is copied to whoever has a slot while
    it stands at the prompt's end; then the next one reads anew.
    """
    times = 1 if engine._scheduler.limits.cuttable else -(-n // SLOTS)
    return [prompt * i for i in range(1, times + 1)]


@pytest.mark.parametrize("length", [1, 15, 150])
@pytest.mark.parametrize("scope", [None, b"salt"])
async def test_the_prompt_is_computed_once(engine: LlamaEngine, length: int, scope: bytes | None) -> None:
    prompt = tuple(range(3 + length, 3 + 2 * length)) if length < 100 else PROMPT  # no two of these share a beginning
    _, usage, computed = await choices(engine, task(prompt=prompt, cache_scope=scope), SLOTS)
    assert (usage.prompt_tokens, usage.completion_tokens) == (length, 3 * SLOTS)
    assert computed == length - usage.cached_tokens + 2 * SLOTS, "the last token of each is not read any more"
    if scope is not None:
        engine._scheduler.forget(scope)


async def test_more_choices_than_slots_compute_it_once(engine: LlamaEngine) -> None:
    n = 3 * SLOTS + 1
    tokens, usage, computed = await choices(engine, task(), n)
    assert [len(each) for each in tokens.values()] == [3] * n
    assert (usage.prompt_tokens, usage.completion_tokens) == (150, 3 * n)
    assert (computed - 2 * n) in reads(engine, 150, n)
    assert engine.held == (0, 0), "without a scope nothing is left"


async def test_what_was_cached_for_the_scope_is_told_once(engine: LlamaEngine) -> None:
    _, first, _ = await choices(engine, task(cache_scope=b"cached"), 2)
    _, second, computed = await choices(engine, task(cache_scope=b"cached"), SLOTS)
    assert first.cached_tokens == 0
    if engine._scheduler.limits.cuttable:
        assert (second.cached_tokens, computed) == (149, 1 + 2 * SLOTS)
    engine._scheduler.forget(b"cached")


SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "seeded": Sampling(temperature=1.3, seed=7),
    "top k": Sampling(temperature=1.3, seed=7, top_k=20, min_p=0.01, top_p=0.95),
    "penalties": Sampling(temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
    "grammar": Sampling(temperature=1, seed=7, grammar='start: "yes" | "no" | "maybe"'),
    "greedy grammar": Sampling(temperature=0, grammar='start: "yes" | "no"'),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
async def test_each_choice_begins_as_it_would_alone(engine: LlamaEngine, kind: str) -> None:
    """The first token comes from the very logits of whoever read the prompt; a seeded task's choices have seeds one apart."""
    sampling = SAMPLINGS[kind]
    alone: list[Token] = []
    for i in range(SLOTS):
        own = sampling if sampling.seed is None else dataclasses.replace(sampling, seed=sampling.seed + i)
        alone += (await choices(engine, task(1, own, logprobs=2), 1))[0][0]
    together, _, _ = await choices(engine, task(8, sampling, logprobs=2), SLOTS)
    assert [tokens[0].id for tokens in together.values()] == [token.id for token in alone]
    assert [tokens[0].logprob for tokens in together.values()] == pytest.approx([token.logprob for token in alone], abs=1e-4)
    assert all(len(tokens[0].top) == 2 for tokens in together.values())
    if kind == "greedy":
        assert len({tuple(token.id for token in tokens) for tokens in together.values()}) == 1
    if sampling.grammar is not None:
        said = {b"".join(token.raw for token in tokens).decode() for tokens in together.values()}
        assert said <= {"yes", "no", "maybe"}


async def test_one_choice_is_cancelled_and_the_others_go_on(engine: LlamaEngine) -> None:
    """Whichever it is: the one that reads the prompt, one that waits for it, or one that generates."""
    for victim, after in itertools.product((0, 1, 3), (0, 1)):
        base = task(20)
        longer = {victim: 300}
        group = [
            dataclasses.replace(base, id=f"{base.id}.{i}", group=base.id, max_tokens=longer.get(i, 20)) for i in range(SLOTS)
        ]
        streams = engine.submit_all(group)
        if after:
            await anext(streams[victim])
        engine.cancel(group[victim].id)
        ends = [await asyncio.wait_for(_end(stream), 30) for stream in streams]
        assert [end.reason for end in ends] == ["cancelled" if i == victim else "length" for i in range(SLOTS)]
        assert [end.completion_tokens for i, end in enumerate(ends) if i != victim] == [20] * (SLOTS - 1)
        assert len(engine._rows) == 0
        assert engine.held[0] == 0


async def _end(stream: Any) -> Finish:
    events = [event async for event in stream]
    assert isinstance(events[-1], Finish)
    return events[-1]


async def test_choices_of_another_prompt_are_refused(engine: LlamaEngine) -> None:
    first = dataclasses.replace(task(200), group="g")
    stream = engine.submit(first)
    with pytest.raises(TaskRefused, match="same prompt") as caught:
        engine.submit(dataclasses.replace(task(prompt=(3, 4, 5)), group="g"))
    assert caught.value.field == "group"
    engine.cancel(first.id)
    assert (await _end(stream)).reason == "cancelled"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_is_what_was_computed(engine: LlamaEngine, path: str) -> None:
    said = {"prompt": "x" * 120} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x" * 120}]}
    before = engine.computed_tokens
    body = {"model": "m", "n": 3 * SLOTS, "max_tokens": 2, "logit_bias": {str(END): -100}, **said}
    reply = (await post(create_app([engine]), path, body)).json()
    assert len(reply["choices"]) == 3 * SLOTS
    assert reply["usage"]["prompt_tokens"] >= 120
    assert reply["usage"]["completion_tokens"] == 6 * SLOTS
    assert engine.computed_tokens - before - 3 * SLOTS in reads(engine, reply["usage"]["prompt_tokens"], 3 * SLOTS)
