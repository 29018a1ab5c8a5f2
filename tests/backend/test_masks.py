"""Masks beside the decode thread: what they cost, who waits for whom, and what a limit comes to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from backend.generating import made, make_task, rest_of, run
from lacre_backend.api.compiling import Compiler
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import ChatCompletionRequest, parse_chat
from lacre_backend.api.schema import grammar as schema
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.thoughts import AnswerForm
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.masks import START_SECONDS, THREADS, TOKEN_SECONDS, Constraint
from lacre_backend.engine.plan import StepPlan
from lacre_backend.engine.protocol import Finish, Grammar, GrammarTooCostly, GrammarTooLarge, Sampling, Task, TaskRefused, Token
from lacre_backend.engine.turns import Fair
from parts.echo_engine import EchoEngine


@pytest.fixture
def small(tiny: Path) -> Iterator[LlamaEngine]:
    settings = LlamaSettings(n_ctx=512, slots=4, threads=1)
    with closing(LlamaEngine(tiny, name="tiny", digest="sha256:0", settings=settings)) as engine:
        yield engine


class Held(Constraint):
    """A mask that takes until it is let go."""

    def __init__(self, let_go: threading.Event) -> None:
        self.cost = -1.0
        self._let_go = let_go

    def advance(self) -> None:
        self._let_go.wait()


@pytest.fixture
def held(small: LlamaEngine) -> Iterator[threading.Event]:
    """No mask is computed until it is set."""
    let_go = threading.Event()
    for _ in range(THREADS):
        small._masks.want(Held(let_go))
    yield let_go
    let_go.set()


async def test_a_late_mask_holds_up_its_own_answer_alone(small: LlamaEngine, held: threading.Event) -> None:
    sampling = Sampling(temperature=0, grammar='start: "abcabc"')
    stream = small.submit(make_task(small, "x", 20, sampling=sampling, endless=False))
    first = await anext(stream)
    assert isinstance(first, Token), "the first mask was there already"
    late = asyncio.create_task(rest_of(stream))
    for _ in range(3):
        assert (await made(small, "y", 10)).finish.completion_tokens == 10
    assert not late.done()
    held.set()
    *tokens, finish = await late
    assert isinstance(finish, Finish) and finish.reason == "stop"
    assert "".join(token.text for token in (first, *tokens) if isinstance(token, Token)) == "abcabc"


class LetGoMidway(LlamaEngine):
    """Lets masks go while the very step is computed that reads again what waited for one."""

    let_go: threading.Event | None = None
    midway = 0

    def _tell_read(self, plan: StepPlan) -> None:
        super()._tell_read(plan)
        again = [segment.task for segment in plan.segments if segment.output and segment.task in self._parked]
        if again and self.let_go is not None and not self.let_go.is_set():
            self.midway += 1
            self.let_go.set()
            constraint = self._jobs[str(again[0])].sampler.constraint
            while constraint is not None and not constraint.ready:
                time.sleep(0.001)


async def test_what_waits_for_its_mask_and_is_read_again_says_each_token_once(tiny: Path) -> None:
    """Two that outgrow the cells send it back to its queue while it waits; its mask comes with the step that reads it again."""
    settings = LlamaSettings(n_ctx=256, threads=1, slots=3, unified=True, cells=512)
    grammar = Sampling(temperature=0, grammar="start: /[a-f]{30}/")
    endless = Sampling(temperature=0, logit_bias={2: -1000.0})
    with closing(LetGoMidway(tiny, name="tiny", digest="sha256:0", settings=settings)) as engine, ExitStack() as at_last:
        alone = await run(engine, Task("alone", tuple(range(3, 103)), 40, sampling=grammar))
        engine.let_go = threading.Event()
        at_last.callback(engine.let_go.set)
        for _ in range(THREADS):
            engine._masks.want(Held(engine.let_go))
        tasks = [Task(f"other {i}", tuple(range(20 + i, 80 + i)), 190, sampling=endless) for i in range(2)]
        others = [asyncio.create_task(run(engine, task)) for task in tasks]
        await asyncio.sleep(0)
        again = await asyncio.wait_for(run(engine, Task("again", tuple(range(3, 103)), 40, sampling=grammar)), 30)
        await asyncio.gather(*others)
        assert (engine.midway, again.ids) == (1, alone.ids)


@pytest.mark.parametrize("reason", ["cancelled", "length"])
async def test_an_answer_that_waits_for_its_mask_still_ends(reason: str, small: LlamaEngine, held: threading.Event) -> None:
    limit = 0.3 if reason == "length" else None
    task = make_task(small, "x", 20, sampling=Sampling(grammar='start: "abcabc"'), endless=False, time_limit=limit)
    waiting = asyncio.create_task(run(small, task))
    await asyncio.sleep(0.1)
    if reason == "cancelled":
        small.cancel(task.id)
    assert (await asyncio.wait_for(waiting, 15)).finish.reason == reason
    assert (small.held[0], len(small._parked)) == (0, 0)


async def test_the_grammar_goes_on_through_all_ways_to_stop(small: LlamaEngine) -> None:
    sampling = Sampling(temperature=0, grammar="start: /[a-f]{40}/")
    answer = await made(small, "x", 60, sampling=sampling, endless=False)
    assert (len(answer.text), set(answer.text) <= set("abcdef"), answer.finish.reason) == (40, True, "stop")
    stopped = await made(small, "x", 60, sampling=sampling, endless=False, stop=(answer.text[5:8],))
    assert stopped.finish.reason == "stop"
    assert len(stopped.text) <= 5


def test_choices_of_a_request_share_its_budget(small: LlamaEngine) -> None:
    compiled = small._masks.compile('start: "a"')
    other = small._masks.compile('start: "a"')
    for _ in range(10):
        compiled.charge(START_SECONDS / 10)
    with pytest.raises(GrammarTooCostly):
        for _ in range(10):
            compiled.charge(2 * TOKEN_SECONDS + START_SECONDS / 10)
    other.charge(TOKEN_SECONDS)


def test_what_an_engine_does_not_follow_is_refused(small: LlamaEngine) -> None:
    many = "start: r0\n" + "\n".join(f'r{i}: "k{i}" | r{i + 1}' for i in range(2500)) + '\nr2500: "end"\n'
    parts = [{"pattern": f"^(.*[ab].{{{150 + i}}}){{3}}$"} for i in range(2)]
    soon = schema.grammar({"type": "string", "allOf": parts})  # its automaton is built with the first character
    for source in ("no rule", "start: other", many, soon, "start: /(?=a)/"):
        with pytest.raises(GrammarTooLarge):
            print(source[:40], small.grammar(source))
    with pytest.raises(TaskRefused):
        small.grammar("start: " + '"a" ' * 600_000)


async def test_a_grammar_is_for_its_own_beginning(small: LlamaEngine) -> None:
    begun = tuple(small.tokenize("ab"))
    sampling = Sampling(grammar=small.grammar('start: "abab"', begun))
    with pytest.raises(TaskRefused, check=lambda refused: refused.field == "grammar"):
        small.submit(make_task(small, "x", 5, sampling=sampling))
    await made(small, "x", 5, sampling=sampling, begun=begun)
    for token in (-1, small.model.n_vocab, 2**32, 2**70):
        with pytest.raises(TaskRefused, check=lambda refused: refused.field == "begun"):
            small.grammar('start: "abab"', (token,))


def test_a_callers_text_never_reaches_the_tokenizer(small: LlamaEngine) -> None:
    """llguidance would tokenize what a grammar forces; its tokenizer here raises."""
    forced = {"type": "object", "properties": {"x" * 5000: {"const": "y" * 5000}}, "required": ["x" * 5000]}
    small.grammar(schema.grammar(forced))


# Whose schema is compiled next: one caller's, however many and dear, leave room for the others'

MANY, HONEST, ANOTHER = ("a", "1"), ("b", "1"), ("c", "1")


class Slow(EchoEngine):
    """Compiles nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.begun = 0

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        self.begun += 1
        self.let_go.wait()
        return super().grammar(source, begun)


def request() -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
    return parse_chat(json.dumps(body).encode())


async def asked(compiler: Compiler, engine: EchoEngine, fair: Fair) -> str:
    """What came of it."""
    try:
        return "compiled" if await compiler.grammar(engine, request(), AnswerForm(HERMES), fair) else "nothing"
    except RequestRefused as refused:  # an echo takes no grammar
        return str(refused)


async def test_one_callers_schemas_leave_a_thread_to_the_others() -> None:
    compiler, slow, quick = Compiler(), Slow(), EchoEngine()
    greedy = [asyncio.create_task(asked(compiler, slow, MANY)) for _ in range(10)]
    try:
        async with asyncio.timeout(15):
            for _ in range(3):
                assert await asked(compiler, quick, HONEST) == await asked(compiler, quick, ANOTHER)
        assert slow.begun == 1 and not any(task.done() for task in greedy)
    finally:
        slow.let_go.set()
    assert len(set(await asyncio.gather(*greedy))) == 1
    assert slow.begun == 10


async def test_nothing_is_compiled_for_who_left() -> None:
    compiler, slow = Compiler(), Slow()
    tasks = [asyncio.create_task(asked(compiler, slow, MANY)) for _ in range(5)]
    while not slow.begun:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
    slow.let_go.set()
    async with asyncio.timeout(15):
        assert await asked(compiler, slow, MANY) == await asked(compiler, EchoEngine(), HONEST)
    assert slow.begun == 2
