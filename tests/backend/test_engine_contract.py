"""What every engine keeps, run against the echo and llama.cpp alike."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from backend.generating import GREEDY, made, make_task, rest_of, run
from lacre_backend.engine.protocol import Engine, EngineError, Finish, PromptTooLong, Sampling, TaskKind, TaskRefused, Token

MIXED = "¡Así! 漢字 and 😀 or é: 日本 😀😀"


async def test_tokens_then_one_finish(engine: Engine) -> None:
    task = make_task(engine, max_tokens=7)
    tokens, finish = await run(engine, task)
    assert dataclasses.replace(finish, text="") == Finish("length", len(task.prompt), 0, 7)
    assert len(tokens) == 7


async def test_text_is_the_tokens_bytes(engine: Engine) -> None:
    answer = await made(engine, MIXED, 24, sampling=GREEDY)
    assert answer.text == b"".join(token.raw for token in answer.tokens).decode("utf-8", "replace") != ""


async def test_code_points_are_not_broken(engine: Engine) -> None:
    # Bytes of 😀 forced one after the other, where the vocabulary spells it by several tokens.
    spelled = engine.tokenize("😀" * 4)
    assert len(spelled) > 4
    sampling = Sampling(temperature=1, seed=1, logit_bias=dict.fromkeys(spelled, 100.0))
    tokens, _ = await made(engine, "😀" * 4, 32, sampling=sampling)
    broken = [token for token in tokens if b"\xf0" in token.raw and token.raw.decode("utf-8", "replace").endswith("\ufffd")]
    assert broken, "the test needs tokens that end inside a code point"
    assert all(not token.text.endswith("\ufffd") for token in broken)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, seed=7)], ids=["greedy", "seeded"])
async def test_some_answers_are_repeatable(engine: Engine, sampling: Sampling) -> None:
    first, second = [await made(engine, sampling=sampling, endless=False) for _ in range(2)]
    assert first.ids == second.ids


@pytest.mark.parametrize("cut", [2, 5, 9])
async def test_stop_string_across_tokens(engine: Engine, cut: int) -> None:
    text = "".join(token.text for token in (await made(engine, max_tokens=24, sampling=GREEDY)).tokens)
    stop = text[cut : cut + 6]
    answer = await made(engine, max_tokens=24, sampling=GREEDY, stop=(stop,))
    assert (answer.finish.reason, answer.text) == ("stop", text[: text.index(stop)])
    assert answer.finish.completion_tokens == len(answer.tokens) < 24


async def test_held_text_comes_out_at_the_end(engine: Engine) -> None:
    text = (await made(engine, max_tokens=6, sampling=GREEDY)).text
    answer = await made(engine, max_tokens=6, sampling=GREEDY, stop=(text[-3:] + "\x00",))
    assert (answer.finish.reason, answer.text) == ("length", text)
    assert answer.finish.text.endswith(text[-1])


async def test_logprobs(engine: Engine) -> None:
    for token in (await made(engine, max_tokens=4, sampling=GREEDY, logprobs=3)).tokens:
        values = [alternative.logprob for alternative in token.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] <= 1e-6
        assert (token.top[0].id, token.top[0].raw, values[0]) == (token.id, token.raw, token.logprob)
    for asked in (None, 0):
        for token in (await made(engine, max_tokens=2, logprobs=asked)).tokens:
            assert (token.logprob is None, token.top) == (asked is None, ())


async def test_a_given_answer_is_scored_as_if_sampled(engine: Engine) -> None:
    answer = await made(engine, max_tokens=6, sampling=GREEDY, logprobs=0)
    scored = await made(engine, given=tuple(answer.ids), max_tokens=len(answer.ids), logprobs=0)
    assert (scored.ids, scored.text) == (answer.ids, answer.text)
    assert [token.logprob for token in scored.tokens] == pytest.approx([token.logprob for token in answer.tokens], abs=0.01)
    assert scored.finish.completion_tokens == len(answer.ids)


async def test_an_unlikely_given_answer_keeps_its_tokens(engine: Engine) -> None:
    given = tuple(engine.tokenize("zq zq zq", special=False))
    scored = await made(engine, given=given, max_tokens=len(given), sampling=GREEDY, logprobs=0, endless=False)
    assert scored.ids == list(given)
    assert sum(token.logprob or 0 for token in scored.tokens) < -10


async def test_cancel_while_running(engine: Engine) -> None:
    task, seen = make_task(engine, max_tokens=500), []
    async for event in engine.submit(task):
        seen.append(event)
        engine.cancel(task.id)
    assert isinstance(seen[-1], Finish)
    assert seen[-1].reason == "cancelled"
    assert len(seen) < 20
    engine.cancel(task.id)  # unknown by now
    assert (await made(engine, max_tokens=2)).finish.completion_tokens == 2, "the engine is free again"


async def test_cancel_before_it_began(engine: Engine) -> None:
    running = asyncio.create_task(made(engine, max_tokens=20))
    await asyncio.sleep(0)
    task = make_task(engine, max_tokens=500)
    waiting = engine.submit(task)
    engine.cancel(task.id)
    assert await rest_of(waiting) == [Finish("cancelled", len(task.prompt), 0, 0)]
    assert (await running).finish.reason == "length"


async def test_many_at_once_all_end(engine: Engine) -> None:
    results = await asyncio.gather(*(made(engine, max_tokens=3) for _ in range(8)))
    assert [finish.completion_tokens for _, finish in results] == [3] * 8


async def test_time_limit(engine: Engine) -> None:
    _, finish = await made(engine, max_tokens=500, time_limit=0.0)
    assert (finish.reason, finish.completion_tokens) == ("length", 0)


async def test_context_end_is_length(engine: Engine) -> None:
    n = engine.model.n_ctx - 3
    _, finish = await made(engine, prompt=tuple((engine.tokenize("wave ") * n)[:n]), max_tokens=50)
    assert finish.completion_tokens <= 3
    assert finish.reason in ("length", "stop")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ()}, "prompt"), ({"max_tokens": 0}, "max_tokens"), ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (10**6,)}, "prompt"), ({"kind": TaskKind.EMBED}, "kind"),
        ({"sampling": Sampling(logit_bias={10**6: 1.0})}, "logit_bias"),
        ({"sampling": Sampling(grammar="no rule here")}, "grammar"), ({"begun": (10**6,)}, "begun"),
        ({"begun": (-1,)}, "begun"), ({"begun": "eos"}, "begun"), ({"given": (5, 5)}, "given"),
        ({"given": (10**6,), "max_tokens": 1}, "given"), ({"given": (5,), "max_tokens": 1, "stop": ("x",)}, "given"),
        ({"given": (5,) * 10**4, "max_tokens": 10**4}, "prompt"),
    ],
)  # fmt: skip
async def test_refusals(engine: Engine, change: dict[str, Any], field: str) -> None:
    if change.get("begun") == "eos":
        assert engine.model.eos is not None
        change = {"begun": (engine.model.eos.id,)}
    with pytest.raises(TaskRefused, check=lambda refused: refused.field == field):
        engine.submit(dataclasses.replace(make_task(engine), **change))


async def test_prompt_longer_than_the_context(engine: Engine) -> None:
    n_ctx = engine.model.n_ctx
    with pytest.raises(PromptTooLong, check=lambda refused: refused.n_ctx == refused.n_prompt == n_ctx):
        engine.submit(make_task(engine, prompt=(5,) * n_ctx))


async def test_an_id_is_used_once_at_a_time(engine: Engine) -> None:
    task = make_task(engine, max_tokens=5)
    stream = engine.submit(task)
    with pytest.raises(TaskRefused, check=lambda refused: refused.field == "id"):
        engine.submit(task)
    assert isinstance((await rest_of(stream))[-1], Finish)
    assert isinstance((await rest_of(engine.submit(task)))[-1], Finish)


def test_model_info(engine: Engine) -> None:
    model, control = engine.model, {token.id: token.text for token in engine.model.control_tokens}
    assert model.digest.startswith("sha256:")
    assert model.chat_template
    assert len(control) == len(model.control_tokens) > 0
    assert model.eos in model.control_tokens
    for token_id, text in control.items():
        assert engine.tokenize(text, special=True) == [token_id]
        assert not control.keys() & set(engine.tokenize(f"a{text} b")), "plain unless asked"


async def test_closing_ends_what_runs_and_waits(own_engine: Engine) -> None:
    streams = [own_engine.submit(make_task(own_engine, max_tokens=500)) for _ in range(3)]
    assert isinstance(await anext(streams[0]), Token)
    await asyncio.to_thread(own_engine.close)
    for stream in streams:
        end = (await rest_of(stream))[-1]
        assert isinstance(end, Finish)
        assert end.reason == "cancelled"
    with pytest.raises(EngineError):
        own_engine.submit(make_task(own_engine))
    own_engine.close()


LENGTH = 14  # tokens: an answer of this length already ends code points in several of them, and is cut after each


async def test_an_answer_that_was_begun_goes_on(engine: Engine) -> None:
    """Wherever it is cut, between code points or in one, in what a stop string holds back or past it."""
    free = await made(engine, MIXED, LENGTH, sampling=GREEDY)
    for cut in range(1, LENGTH + 1):
        begun = tuple(free.ids[:cut])
        rest = await made(engine, MIXED, LENGTH - cut, sampling=GREEDY, begun=begun)
        whole = b"".join(token.raw for token in [*free.tokens[:cut], *rest.tokens]).decode("utf-8", "replace")
        assert "".join(token.text for token in free.tokens[:cut]) + rest.text == whole
        assert (rest.finish.reason, rest.finish.completion_tokens) == ("length", LENGTH - cut)
        assert rest.finish.prompt_tokens == free.finish.prompt_tokens + cut


async def test_a_stop_string_that_was_begun(engine: Engine) -> None:
    text = (await made(engine, max_tokens=24, sampling=GREEDY)).text
    stop = text[5:13]
    tokens = (await made(engine, max_tokens=24, sampling=GREEDY, stop=(stop,))).tokens
    for cut in range(1, len(tokens) + 1):
        begun = tuple(token.id for token in tokens[:cut])
        rest = await made(engine, max_tokens=24 - cut, sampling=GREEDY, stop=(stop,), begun=begun)
        assert "".join(token.text for token in tokens[:cut]) + rest.text == text[: text.index(stop)]
        assert rest.finish.reason == "stop"
    assert rest.tokens == []  # all of it was there: nothing is sampled for the end alone


async def test_choices_are_taken_together_or_not_at_all(engine: Engine) -> None:
    first = make_task(engine, max_tokens=2)
    good = [dataclasses.replace(first, id=f"{first.id}.{i}", group=first.id) for i in range(3)]
    with pytest.raises(TaskRefused):
        engine.submit_all([*good, dataclasses.replace(first, id=f"{first.id}.9", max_tokens=0)])
    streams = engine.submit_all(good)  # none of these ids is in use
    assert [sum(isinstance(event, Token) for event in await rest_of(stream)) for stream in streams] == [2, 2, 2]


def test_what_tokens_release(engine: Engine) -> None:
    ids = engine.tokenize("Hello there, you")
    assert "".join(engine.released(ids)) == "Hello there, you"
    assert "".join(engine.released(ids, ("there",))) == "Hello "
    assert len(engine.released(ids)) == len(engine.released(ids, ("there",))) == len(ids)
