"""Speculation in the engine: answers are what they would be without, whatever is guessed, and for every kind of task.

`Told` guesses from what each answer said without speculation, and is wrong now and then. `Eager` checks all that is guessed,
because these tests are not about how long steps take.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, Made, made, make_task, run
from lacre.errors import SettingsError
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.context import Compute
from lacre_backend.engine.draft_model import DraftFile, DraftModel, DraftVocabularyDiffers
from lacre_backend.engine.drafting import MAX_DRAFT, Wanted
from lacre_backend.engine.gain import Gain, Offer
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu
from lacre_backend.engine.protocol import Finish, Sampling, Token
from lacre_backend.engine.speculation import Speculation, SpeculationCounts
from lacre_backend.engine.tokens import Tokens
from lacre_backend.models import gguf
from lacre_backend.serve import load_engine
from lacre_backend.settings import ModelSettings
from parts.tiny_model import tiny_lora, tiny_model, tiny_recurrent_model, tiny_vocabulary

SPLIT = LlamaSettings(n_ctx=512, threads=1, slots=4, speculation="lookup")
UNIFIED = dataclasses.replace(SPLIT, unified=True, cells=4 * 300)
PROMPTS = (
    "The sea is wide, and the sky is",
    "one two three one two three one two",
    "def read(path):\n    return open(path).read()\n\ndef write(path):\n    return open(path",
    "abc abc abc abc",
    "A list: first, second, third.\nThe same list: first,",
    "x",
)


class Eager(Gain):
    """Every guess is worth it."""

    def allot(self, offers: Sequence[Offer], each: float = 0.0) -> list[int]:
        most = min(max(offer.most for offer in offers), self._most // len(offers))
        return [most if self._even else min(offer.most, most) for offer in offers]


class Told:
    """A `Drafter` that knows the answers. wrong: the share of its guesses that are not right."""

    free = True
    seconds = 0.0

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float) -> None:
        self.answers = answers
        self.wrong = wrong
        self.random = random.Random(1)

    def draft(self, wanted: Sequence[Wanted]) -> dict[str, list[int]]:
        return {task.id: found for task in wanted if task.most > 0 and (found := self.guesses(task))}

    def guesses(self, task: Wanted) -> list[int]:
        every = task.tokens.all.tolist()
        prompt, said = tuple(every[: task.tokens.prompt]), every[task.tokens.prompt :]
        answer = self.answers.get(prompt, [])
        ahead = answer[len(said) : len(said) + task.most] if answer[: len(said)] == said else []
        return [token if self.random.random() >= self.wrong else 5 + token % 200 for token in ahead]

    def forget(self, task_id: str) -> None: ...

    def wipe(self) -> None: ...

    def close(self) -> None: ...


def eager(engine: LlamaEngine) -> LlamaEngine:
    assert engine.speculation is not None
    limits = engine._scheduler.limits
    engine.speculation.gain = Eager(limits.drafts, even=not limits.unified)
    return engine


def told(engine: LlamaEngine, answers: dict[tuple[int, ...], list[int]], wrong: float = 0.2) -> LlamaEngine:
    engine.speculation = Speculation(Told(answers, wrong), engine._scheduler.limits)
    return eager(engine)


def counts(engine: LlamaEngine) -> SpeculationCounts:
    assert engine.speculation is not None
    return engine.speculation.counts


@contextlib.contextmanager
def without(engine: LlamaEngine) -> Iterator[None]:
    assert engine.speculation is not None
    engine.speculation.enabled = False
    yield
    engine.speculation.enabled = True


def engine_of(path: Path, settings: LlamaSettings, **more: Any) -> contextlib.closing[LlamaEngine]:
    return contextlib.closing(LlamaEngine(path, name="m", digest="sha256:0", settings=settings, **more))


@pytest.fixture(scope="module", params=[SPLIT, UNIFIED], ids=["split", "unified"])
def tiny_engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LlamaEngine]:
    with engine_of(tiny, request.param) as engine:
        yield eager(engine)


def alike(plain: Made, guessed: Made, tie: float = 0.02) -> None:
    """The same tokens, up to one that was a tie. llama.cpp rounds differently if a step has other tokens beside a token."""
    for one, other in zip(plain.tokens, guessed.tokens, strict=False):
        assert one.logprob is not None
        assert other.logprob is not None
        assert abs(one.logprob - other.logprob) < tie
        if one.id != other.id:
            return
    assert guessed.ids == plain.ids
    assert guessed.finish == plain.finish


async def both(engine: LlamaEngine, text: str, max_tokens: int = 40, **fields: Any) -> tuple[Made, Made]:
    """A task without guesses, and with guesses of which most are right."""
    answers: dict[tuple[int, ...], list[int]] = {}
    told(engine, answers)
    task = make_task(engine, text, max_tokens, **fields)
    with without(engine):
        plain = await run(engine, task)
    answers[task.prompt] = plain.ids
    guessed = await run(engine, dataclasses.replace(task, id=task.id + "-again"))
    return plain, guessed


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


# Draft models


@pytest.mark.parametrize("settings", [SPLIT, UNIFIED], ids=["split", "unified"])
@pytest.mark.parametrize("seed", [1, 2], ids=["the model itself", "another of its vocabulary"])
async def test_a_draft_model(tiny: Path, tmp_path: Path, settings: LlamaSettings, seed: int) -> None:
    draft = DraftFile(tiny_model(tmp_path / "draft.gguf", seed=seed, n_ctx=256))
    with engine_of(tiny, dataclasses.replace(settings, speculation="draft"), draft=draft) as engine:
        eager(engine)
        tasks = [make_task(engine, text, 40, sampling=GREEDY, logprobs=0) for text in (*PROMPTS, "long " * 70)]
        with without(engine):
            plain = [await run(engine, task) for task in tasks]
        again = [dataclasses.replace(task, id=task.id + "-again") for task in tasks]
        guessed = await asyncio.gather(*(run(engine, task) for task in again))
        for one, other in zip(plain, guessed, strict=True):
            alike(one, other)
        assert counts(engine).guessed > 40
        if seed == 1:
            assert counts(engine).acceptance > 0.9, "its own guesses are right"
        assert engine.held == (0, 0)
        alike(plain[0], await run(engine, dataclasses.replace(tasks[0], id="alone")))


async def test_a_draft_model_keeps_no_cells_of_ended_tasks(tiny: Path) -> None:
    with engine_of(tiny, dataclasses.replace(SPLIT, speculation="draft"), draft=DraftFile(tiny)) as engine:
        eager(engine)
        for text in PROMPTS * 2:  # more than it has sequences
            await made(engine, text, 12, sampling=GREEDY)
        assert engine.speculation is not None
        drafter: Any = engine.speculation._drafter
        assert (drafter._tasks, sorted(drafter._free)) == ({}, [0, 1, 2, 3])


def test_a_draft_model_takes_wrong_guesses_back(tiny: Path) -> None:
    """However an answer went on: it guesses what it would guess if it had read only that."""
    with engine_of(tiny, SPLIT) as engine:
        limits = dataclasses.replace(engine._scheduler.limits, slots=2, cells=1024)
        draft, fresh = (DraftModel(DraftFile(tiny), engine._model, limits, Compute(1), Gpu()) for _ in range(2))
        chance = random.Random(2)
        answers = {name: Tokens(engine.tokenize(text)) for name, text in zip("ab", PROMPTS, strict=False)}
        for step in range(40):
            for name, tokens in answers.items():
                task = Wanted(name, tokens, chance.randint(1, 5), able=True)
                guesses = draft.draft([task])[name]
                assert guesses == fresh.draft([task])[name]
                np.testing.assert_allclose(draft._context.logits(1), fresh._context.logits(1), atol=0.05)
                fresh.forget(name)
                right = chance.randint(0, task.most)  # of them, and then other tokens
                for token in [*guesses[:right], *(chance.randrange(3, 200) for _ in range(chance.randint(1, 3)))]:
                    tokens.append(token)
            if step == 20:
                draft.forget("a")
        draft.close()
        fresh.close()


def test_a_draft_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary("llama")
    tokens = vocabulary["tokenizer.ggml.tokens"]
    i, j = tokens.index("<0x41>"), tokens.index("<0x42>")
    tokens[i], tokens[j] = tokens[j], tokens[i]
    other = tiny_model(tmp_path / "other.gguf", vocabulary=vocabulary)
    with pytest.raises(DraftVocabularyDiffers, match=r"other\.gguf has another vocabulary.*: 2 tokens differ, such as 68, 69"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=other))
    with pytest.raises(DraftVocabularyDiffers, match="not one vocabulary"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=gguf.find().path))


def test_settings_that_cannot_speculate(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the GGUF file of a draft model"):
        ModelSettings(path=tiny, speculation="draft")
    recurrent = tiny_recurrent_model(tmp_path / "recurrent.gguf")
    with pytest.raises(SettingsError, match="cannot take back wrong guesses"):
        load_engine(ModelSettings(path=recurrent, threads=1, speculation="lookup"))
    with pytest.raises(SettingsError, match="cannot draft"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=recurrent))
