"""Speculation in the engine: answers are what they would be without, whatever is guessed, and for every kind of task.

`Told` guesses from what each answer said without speculation, and is wrong now and then. `Eager` checks all that is guessed,
because these tests are not about how long steps take.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.generating import GREEDY, made, make_task, run
from backend.guessing import PROMPTS, SPLIT, UNIFIED, Told, alike, both, counts, eager, engine_of, told, without
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.drafting import MAX_DRAFT, Wanted
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.lookup import Lookup
from lacre_backend.engine.protocol import Finish, Sampling, Token
from lacre_backend.engine.speculation import Speculation
from lacre_backend.models import gguf
from parts.tiny_model import tiny_lora


@pytest.fixture(scope="module", params=[SPLIT, UNIFIED], ids=["split", "unified"])
def tiny_engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LlamaEngine]:
    with engine_of(tiny, request.param) as engine:
        yield eager(engine)


# Greedy answers


@pytest.mark.parametrize("text", PROMPTS)
async def test_greedy_answers_are_the_same(tiny_engine: LlamaEngine, text: str) -> None:
    plain, guessed = await both(tiny_engine, text, sampling=GREEDY, logprobs=0)
    alike(plain, guessed)
    assert counts(tiny_engine).accepted > 20, "most were guessed"
    assert counts(tiny_engine).guessed > counts(tiny_engine).accepted, "and some were not right"
    assert tiny_engine.held == (0, 0)


async def test_several_at_once(tiny_engine: LlamaEngine) -> None:
    """Each beside the others, whose guesses are right in other places; more tasks than slots."""
    answers: dict[tuple[int, ...], list[int]] = {}
    told(tiny_engine, answers)
    tasks = [make_task(tiny_engine, text, 20 + 3 * i, sampling=GREEDY, logprobs=0) for i, text in enumerate(PROMPTS)]
    with without(tiny_engine):
        plain = [await run(tiny_engine, task) for task in tasks]
    answers |= {task.prompt: one.ids for task, one in zip(tasks, plain, strict=True)}
    again = [dataclasses.replace(task, id=task.id + "-again") for task in tasks]
    guessed = await asyncio.gather(*(run(tiny_engine, task) for task in again))
    for one, other in zip(plain, guessed, strict=True):
        alike(one, other)
    assert counts(tiny_engine).accepted > 40
    assert tiny_engine.held == (0, 0)


@pytest.mark.parametrize("wrong", [0.0, 1.0])
async def test_steps_are_saved_where_guesses_are_right(tiny: Path, wrong: float) -> None:
    with engine_of(tiny, SPLIT) as engine:
        task = make_task(engine, max_tokens=61, sampling=GREEDY)
        with without(engine):
            plain = await run(engine, task)
        told(engine, {task.prompt: plain.ids}, wrong)
        before = engine.steps
        assert (await run(engine, dataclasses.replace(task, id="again"))).ids == plain.ids
        steps = engine.steps - before
        assert (steps <= 1 + 60 // MAX_DRAFT + 1) if wrong == 0 else steps == 61
        assert counts(engine).acceptance == 1 - wrong


async def test_real_text_is_the_same_with_lookup() -> None:
    """The default model copies a text. Where the logits of a step with guesses lead to another word, it was a tie."""
    text = "Lighthouse, harbour, anchor, rope, sail, rudder, compass, chart, lantern, keel."
    prompt = f"List: {text}\nThe same list: {text}\nThe same list:"
    with engine_of(gguf.find().path, dataclasses.replace(SPLIT, slots=1)) as engine:
        eager(engine)
        with without(engine):
            plain = await made(engine, prompt, 48, sampling=GREEDY, logprobs=0)
        guessed = await made(engine, prompt, 48, sampling=GREEDY, logprobs=0)
        assert counts(engine).accepted > 24
    alike(plain, guessed, tie=0.25)


async def test_many_prompts_with_lookup(tiny_engine: LlamaEngine) -> None:
    """Texts by chance, of which most repeat themselves; as many at a time as there are slots, and more."""
    chance = random.Random(5)
    tiny_engine.speculation = Speculation(Lookup(), tiny_engine._scheduler.limits)
    eager(tiny_engine)
    tasks = []
    for _ in range(80):
        words = ["".join(chance.choices("abcdef ", k=chance.randint(1, 9))) for _ in range(chance.randint(1, 4))]
        tasks.append(make_task(tiny_engine, "".join(chance.choices(words, k=10)), 24, sampling=GREEDY, logprobs=0))
    with without(tiny_engine):
        plain = [await run(tiny_engine, task) for task in tasks]
    again = [dataclasses.replace(task, id=task.id + "-again") for task in tasks]
    guessed = await asyncio.gather(*(run(tiny_engine, task) for task in again))
    for one, other in zip(plain, guessed, strict=True):
        alike(one, other)
    assert sum(one.ids == other.ids for one, other in zip(plain, guessed, strict=True)) >= 76, "ties are rare"
    assert counts(tiny_engine).accepted > 100
    assert counts(tiny_engine).guessed > 1.3 * counts(tiny_engine).accepted, "and many guesses were wrong"
    assert tiny_engine.held == (0, 0)


# Other kinds of tasks


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.2, seed=3),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=4),
        Sampling(temperature=0, frequency_penalty=0.7, presence_penalty=0.3),
        Sampling(temperature=1, repeat_penalty=1.3, seed=9),
        Sampling(temperature=0, logit_bias={70: 9.0, 90: 9.5}),
    ],
    ids=["seed", "top_k", "penalties", "penalties and seed", "bias"],
)
async def test_what_is_drawn_with_a_seed_or_counted_is_the_same(tiny_engine: LlamaEngine, sampling: Sampling) -> None:
    plain, guessed = await both(tiny_engine, PROMPTS[0], sampling=sampling)
    assert guessed.ids == plain.ids
    assert counts(tiny_engine).accepted > 10


async def test_logprobs_are_those_of_the_same_positions(tiny_engine: LlamaEngine) -> None:
    plain, guessed = await both(tiny_engine, PROMPTS[1], sampling=GREEDY, logprobs=3)
    for one, other in zip(plain.tokens, guessed.tokens, strict=True):
        assert one.id == other.id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [top.id for top in one.top] == [top.id for top in other.top]


@pytest.mark.parametrize("at", [1, 7, 8, 20])
async def test_a_stop_string_ends_it_within_a_step(tiny_engine: LlamaEngine, at: int) -> None:
    with without(tiny_engine):
        plain = await made(tiny_engine, PROMPTS[0], 40, sampling=GREEDY)
    stop = plain.text[at : at + 2]
    one, other = await both(tiny_engine, PROMPTS[0], 40, sampling=GREEDY, stop=(stop,))
    assert (other.text, other.ids, other.finish) == (one.text, one.ids, one.finish)
    assert other.finish.reason == "stop"
    assert tiny_engine.held == (0, 0)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17])
async def test_it_never_makes_more_than_asked_for(tiny_engine: LlamaEngine, max_tokens: int) -> None:
    plain, guessed = await both(tiny_engine, PROMPTS[2], max_tokens, sampling=GREEDY)
    assert guessed.ids == plain.ids
    assert guessed.finish == plain.finish
    assert guessed.finish.completion_tokens == max_tokens


async def test_the_context_ends_it(tiny_engine: LlamaEngine) -> None:
    plain, guessed = await both(tiny_engine, "ab" * 230, 500, sampling=GREEDY)
    assert guessed.ids == plain.ids
    assert guessed.finish == plain.finish


async def test_an_answer_that_the_model_ends(tiny_engine: LlamaEngine) -> None:
    """A right guess behind which the model ends its answer."""
    end = tiny_engine.model.eos
    assert end is not None
    sampling = Sampling(temperature=2.0, seed=11, logit_bias={end.id: 4.0})
    plain, guessed = await both(tiny_engine, PROMPTS[0], 200, sampling=sampling, endless=False)
    assert (guessed.ids, guessed.finish) == (plain.ids, plain.finish)
    assert guessed.finish.reason == "stop"
    assert len(plain.ids) > 3


async def test_answers_under_a_grammar_and_given_ones_are_not_guessed(tiny_engine: LlamaEngine) -> None:
    fields: list[dict[str, Any]] = [
        {"sampling": Sampling(temperature=0, grammar='start: ("ab" | "cd")+ "."'), "endless": False},
        {"given": (70,) * 12, "max_tokens": 12, "sampling": GREEDY},
    ]
    for more in fields:
        plain, guessed = await both(tiny_engine, PROMPTS[0], more.pop("max_tokens", 12), **more)
        assert guessed.ids == plain.ids
        assert counts(tiny_engine).guessed == 0


async def test_beside_an_answer_under_a_grammar(tiny_engine: LlamaEngine) -> None:
    answers: dict[tuple[int, ...], list[int]] = {}
    told(tiny_engine, answers)
    free = make_task(tiny_engine, PROMPTS[0], 60, sampling=GREEDY)
    bound = make_task(tiny_engine, PROMPTS[3], 30, sampling=Sampling(temperature=0, grammar="start: /[a-f]{30}/"))
    with without(tiny_engine):
        plain = [(await run(tiny_engine, task)).ids for task in (free, bound)]
    answers |= {free.prompt: plain[0], bound.prompt: plain[1]}
    again = [dataclasses.replace(task, id=task.id + "-again") for task in (free, bound)]
    assert [one.ids for one in await asyncio.gather(*(run(tiny_engine, task) for task in again))] == plain
    assert counts(tiny_engine).accepted > 0, "when it is alone, or in one cache with the other"


async def test_choices_and_the_prefix_cache(tiny_engine: LlamaEngine) -> None:
    """Several choices copy one prompt; what a guessed answer left in the cache is right for the next request."""
    scope = b"scope"
    for n in (1, 3):
        answers: dict[tuple[int, ...], list[int]] = {}
        told(tiny_engine, answers)
        prompt = tuple(range(3 + n, 80))
        tasks = [make_task(tiny_engine, prompt=prompt, max_tokens=30, sampling=GREEDY, group=f"g{n}" if n > 1 else None,
                           cache_scope=scope) for _ in range(n)]  # fmt: skip
        with without(tiny_engine):
            plain = await run(tiny_engine, dataclasses.replace(tasks[0], group=None, cache_scope=None))
            longer = make_task(tiny_engine, prompt=(*prompt, *plain.ids, 70, 71), max_tokens=20, sampling=GREEDY)
            fresh = await run(tiny_engine, longer)
        answers[prompt] = plain.ids
        streams = tiny_engine.submit_all(tasks)
        for stream in streams:
            assert [event.id async for event in stream if isinstance(event, Token)] == plain.ids
        reused = await run(tiny_engine, dataclasses.replace(longer, id=f"longer-{n}", cache_scope=scope))
        assert reused.finish.cached_tokens > len(prompt) + 16
        assert reused.ids == fresh.ids
        assert counts(tiny_engine).accepted > 20
    tiny_engine._scheduler.forget(scope)


async def test_a_task_cancelled_between_two_confirmed_tokens(tiny_engine: LlamaEngine) -> None:
    with without(tiny_engine):
        plain = await made(tiny_engine, PROMPTS[0], 60, sampling=GREEDY)
    task = make_task(tiny_engine, PROMPTS[0], 60, sampling=GREEDY)
    told(tiny_engine, {task.prompt: plain.ids}, wrong=0.0)
    said: list[int] = []
    async for event in tiny_engine.submit(task):
        if isinstance(event, Token):
            said.append(event.id)
            tiny_engine.cancel(task.id)
        elif isinstance(event, Finish):
            assert event.completion_tokens == len(said)
    assert said == plain.ids[: len(said)]
    assert tiny_engine.held == (0, 0)
    assert (await made(tiny_engine, PROMPTS[0], 60, sampling=GREEDY)).ids == plain.ids


async def test_adapters(tiny: Path, tmp_path: Path) -> None:
    """Each answer is its adapter's own, though what guesses does not know of adapters."""
    lora = tiny_lora(tmp_path / "lora.gguf")
    with engine_of(tiny, SPLIT, adapters=[AdapterFile("x", lora, "sha256:1")]) as engine:
        answers: dict[tuple[int, ...], list[int]] = {}
        told(engine, answers)
        tasks = [
            make_task(engine, text, 30, sampling=GREEDY, adapter=name, logprobs=0)
            for text, name in zip(PROMPTS, [None, "x"] * 2, strict=False)
        ]
        with without(engine):
            plain = [await run(engine, task) for task in tasks]
        answers |= {task.prompt: one.ids for task, one in zip(tasks, plain, strict=True)}
        again = [dataclasses.replace(task, id=task.id + "-again") for task in tasks]
        guessed = await asyncio.gather(*(run(engine, task) for task in again))
        for one, other in zip(plain, guessed, strict=True):
            alike(one, other)


# Drawn answers

FEW = (70, 80, 90, 100)  # tokens; all others are excluded
DRAWN = 700


async def test_drawn_answers_keep_their_probabilities(tiny: Path) -> None:
    """Pairs of tokens, drawn with guesses that are right about as often as chance. chi-square against what the model says."""
    never = dict.fromkeys(range(300), -1000.0) | dict.fromkeys(FEW, 0.0)
    with engine_of(tiny, dataclasses.replace(SPLIT, slots=4)) as engine:
        never = {token: value for token, value in never.items() if token < engine.model.n_vocab}
        expected = await pairs(engine, never)
        sampling = Sampling(temperature=1.0, logit_bias=never)
        task = make_task(engine, max_tokens=4, sampling=sampling)
        told(engine, {})
        assert engine.speculation is not None
        engine.speculation._drafter = Constant((70, 80, 90))
        found: Counter[tuple[int, ...]] = Counter()
        for at in range(0, DRAWN, 4):
            tasks = [dataclasses.replace(task, id=f"d{at + i}") for i in range(4)]
            for one in await asyncio.gather(*(run(engine, task) for task in tasks)):
                found[tuple(one.ids[1:3])] += 1
        assert counts(engine).accepted > DRAWN / 20
    total = sum(found.values())
    square = sum((found[pair] - total * share) ** 2 / (total * share) for pair, share in expected.items())
    assert square < 44.3, "15 degrees of freedom: 1 of 10,000 runs of a right engine exceeds it"


class Constant(Told):
    """Always the same guesses."""

    def __init__(self, guesses: tuple[int, ...]) -> None:
        self.always = guesses

    def guesses(self, task: Wanted) -> list[int]:
        return list(self.always[: task.most])


async def pairs(engine: LlamaEngine, bias: dict[int, float]) -> dict[tuple[int, int], float]:
    """The probability of each second and third token, over all first ones."""
    shares: dict[tuple[int, int], float] = dict.fromkeys(((a, b) for a in FEW for b in FEW), 0.0)
    first = await likely(engine, ())
    for one, p in first.items():
        for two, q in (await likely(engine, (one,))).items():
            for three, r in (await likely(engine, (one, two))).items():
                shares[two, three] += p * q * r
    return shares


async def likely(engine: LlamaEngine, said: tuple[int, ...]) -> dict[int, float]:
    """The next token's probabilities among the few."""
    task = make_task(engine, max_tokens=1, sampling=GREEDY, logprobs=engine.model.n_vocab - 1)
    with without(engine):
        token = (await run(engine, dataclasses.replace(task, prompt=(*task.prompt, *said)))).tokens[0]
    raw = {top.id: 2.718281828459045**top.logprob for top in token.top if top.id in FEW}
    return {one: p / sum(raw.values()) for one, p in raw.items()}
