"""What every engine keeps, run against the echo and llama.cpp alike."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from lacre_backend.engine.protocol import (
    Engine,
    EngineError,
    Finish,
    PromptTooLong,
    Sampling,
    Task,
    TaskKind,
    TaskRefused,
    Token,
)

GREEDY = Sampling(temperature=0)
MakeTask = Callable[..., Task]
Run = Callable[..., Any]


async def test_tokens_then_one_finish(engine: Engine, make_task: MakeTask, run: Run) -> None:
    task = make_task(engine, max_tokens=7)
    tokens, finish = await run(engine, task)
    assert finish.reason == "length"
    assert finish.prompt_tokens == len(task.prompt)
    assert finish.completion_tokens == len(tokens) == 7
    assert finish.cached_tokens == 0


async def test_text_is_the_tokens_bytes(engine: Engine, make_task: MakeTask, run: Run) -> None:
    tokens, finish = await run(engine, make_task(engine, "¡Así! 漢字 and 😀 or é:", max_tokens=24, sampling=GREEDY))
    whole = b"".join(token.raw for token in tokens).decode("utf-8", "replace")
    assert "".join(token.text for token in tokens) + finish.text == whole
    assert whole


async def test_code_points_are_not_broken(engine: Engine, make_task: MakeTask, run: Run) -> None:
    # Bytes of 😀 forced one after the other, where the vocabulary spells it by several tokens.
    spelled = engine.tokenize("😀" * 4)
    assert len(spelled) > 4
    bias = dict.fromkeys(spelled, 100.0)
    sampling = Sampling(temperature=1, seed=1, logit_bias=bias)
    tokens, _ = await run(engine, make_task(engine, "😀" * 4, max_tokens=32, sampling=sampling))
    broken = [token for token in tokens if b"\xf0" in token.raw and token.raw.decode("utf-8", "replace").endswith("\ufffd")]
    assert broken, "the test needs tokens that end inside a code point"
    assert all(not token.text.endswith("\ufffd") for token in broken)


async def test_greedy_is_repeatable(engine: Engine, make_task: MakeTask, run: Run) -> None:
    first, _ = await run(engine, make_task(engine, sampling=GREEDY, endless=False))
    second, _ = await run(engine, make_task(engine, sampling=GREEDY, endless=False))
    assert [token.id for token in first] == [token.id for token in second]


async def test_seed_is_repeatable(engine: Engine, make_task: MakeTask, run: Run) -> None:
    sampling = Sampling(temperature=1.5, seed=7)
    first, _ = await run(engine, make_task(engine, sampling=sampling))
    second, _ = await run(engine, make_task(engine, sampling=sampling))
    assert [token.id for token in first] == [token.id for token in second]


@pytest.mark.parametrize("cut", [2, 5, 9])
async def test_stop_string_across_tokens(engine: Engine, make_task: MakeTask, run: Run, cut: int) -> None:
    free, _ = await run(engine, make_task(engine, max_tokens=24, sampling=GREEDY))
    text = "".join(token.text for token in free)
    stop = text[cut : cut + 6]
    tokens, finish = await run(engine, make_task(engine, max_tokens=24, sampling=GREEDY, stop=(stop,)))
    out = "".join(token.text for token in tokens) + finish.text
    assert finish.reason == "stop"
    assert out == text[: text.index(stop)]
    assert finish.completion_tokens == len(tokens) < 24


async def test_held_text_comes_out_at_the_end(engine: Engine, make_task: MakeTask, run: Run) -> None:
    free, end = await run(engine, make_task(engine, max_tokens=6, sampling=GREEDY))
    text = "".join(token.text for token in free) + end.text
    tokens, finish = await run(engine, make_task(engine, max_tokens=6, sampling=GREEDY, stop=(text[-3:] + "\x00",)))
    assert finish.reason == "length"
    assert finish.text.endswith(text[-1])
    assert "".join(token.text for token in tokens) + finish.text == text


async def test_logprobs(engine: Engine, make_task: MakeTask, run: Run) -> None:
    tokens, _ = await run(engine, make_task(engine, max_tokens=4, sampling=GREEDY, logprobs=3))
    for token in tokens:
        assert len(token.top) == 3
        values = [alternative.logprob for alternative in token.top]
        assert values == sorted(values, reverse=True)
        assert token.logprob is not None
        assert values[0] <= 1e-6
        assert (token.top[0].id, token.top[0].raw) == (token.id, token.raw)
        assert token.logprob == values[0]


async def test_no_logprobs_unless_asked(engine: Engine, make_task: MakeTask, run: Run) -> None:
    tokens, _ = await run(engine, make_task(engine, max_tokens=2))
    assert all(token.logprob is None and token.top == () for token in tokens)
    tokens, _ = await run(engine, make_task(engine, max_tokens=2, logprobs=0))
    assert all(token.logprob is not None and token.top == () for token in tokens)


async def test_cancel_while_running(engine: Engine, make_task: MakeTask, run: Run) -> None:
    task = make_task(engine, max_tokens=500)
    seen = []
    async for event in engine.submit(task):
        seen.append(event)
        engine.cancel(task.id)
    assert isinstance(seen[-1], Finish)
    assert seen[-1].reason == "cancelled"
    assert len(seen) < 20
    _, finish = await run(engine, make_task(engine, max_tokens=2))  # the engine is free again
    assert finish.completion_tokens == 2


async def test_cancel_before_it_began(engine: Engine, make_task: MakeTask, run: Run) -> None:
    first, second = make_task(engine, max_tokens=20), make_task(engine, max_tokens=500)
    running = asyncio.create_task(run(engine, first))
    await asyncio.sleep(0)
    waiting = engine.submit(second)
    engine.cancel(second.id)
    events = [event async for event in waiting]
    assert events == [Finish("cancelled", len(second.prompt), 0, 0)]
    _, finish = await running
    assert finish.reason == "length"


async def test_cancel_of_the_unknown_is_nothing(engine: Engine) -> None:
    engine.cancel("never submitted")


async def test_many_at_once_all_end(engine: Engine, make_task: MakeTask, run: Run) -> None:
    results = await asyncio.gather(*(run(engine, make_task(engine, max_tokens=3)) for _ in range(8)))
    assert [finish.completion_tokens for _, finish in results] == [3] * 8


async def test_time_limit(engine: Engine, make_task: MakeTask, run: Run) -> None:
    _, finish = await run(engine, make_task(engine, max_tokens=500, time_limit=0.0))
    assert finish.reason == "length"
    assert finish.completion_tokens == 0


async def test_context_end_is_length(engine: Engine, make_task: MakeTask, run: Run) -> None:
    n = engine.model.n_ctx - 3
    prompt = tuple((engine.tokenize("wave ") * n)[:n])
    _, finish = await run(engine, make_task(engine, prompt=prompt, max_tokens=50, sampling=Sampling(logit_bias={})))
    assert finish.completion_tokens <= 3
    assert finish.reason in ("length", "stop")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ()}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (10**6,)}, "prompt"),
        ({"kind": TaskKind.EMBED}, "kind"),
        ({"sampling": Sampling(logit_bias={10**6: 1.0})}, "logit_bias"),
        ({"sampling": Sampling(grammar="no rule here")}, "grammar"),
    ],
)
async def test_refusals(engine: Engine, make_task: MakeTask, change: dict[str, Any], field: str) -> None:
    with pytest.raises(TaskRefused) as caught:
        engine.submit(dataclasses.replace(make_task(engine), **change))
    assert caught.value.field == field


async def test_prompt_longer_than_the_context(engine: Engine, make_task: MakeTask) -> None:
    with pytest.raises(PromptTooLong) as caught:
        engine.submit(make_task(engine, prompt=(5,) * engine.model.n_ctx))
    assert caught.value.n_ctx == caught.value.n_prompt == engine.model.n_ctx


async def test_an_id_is_used_once_at_a_time(engine: Engine, make_task: MakeTask) -> None:
    task = make_task(engine, max_tokens=5)
    stream = engine.submit(task)
    with pytest.raises(TaskRefused) as caught:
        engine.submit(task)
    assert caught.value.field == "id"
    assert isinstance([event async for event in stream][-1], Finish)
    assert isinstance([event async for event in engine.submit(task)][-1], Finish)


def test_model_info(engine: Engine) -> None:
    model = engine.model
    assert model.digest.startswith("sha256:")
    assert model.chat_template
    assert len({token.id for token in model.control_tokens}) == len(model.control_tokens) > 0
    assert model.eos in model.control_tokens


def test_special_text_is_plain_unless_asked(engine: Engine) -> None:
    control = {token.id: token.text for token in engine.model.control_tokens}
    for token_id, text in control.items():
        assert engine.tokenize(text, special=True) == [token_id]
        assert not control.keys() & set(engine.tokenize(f"a{text} b"))


async def test_closing_ends_what_runs_and_waits(
    request: pytest.FixtureRequest, make_task: MakeTask, own_engine: Engine
) -> None:
    streams = [own_engine.submit(make_task(own_engine, max_tokens=500)) for _ in range(3)]
    assert isinstance(await anext(streams[0]), Token)
    await asyncio.to_thread(own_engine.close)
    for stream in streams:
        events = [event async for event in stream]
        assert isinstance(events[-1], Finish)
        assert events[-1].reason == "cancelled"
    with pytest.raises(EngineError):
        own_engine.submit(make_task(own_engine))
    own_engine.close()


LENGTH = 14  # tokens: an answer of this length already ends code points in several of them, and is cut after each


async def test_an_answer_that_was_begun_goes_on(engine: Engine, make_task: MakeTask, run: Run) -> None:
    """Wherever it is cut, between code points or in one, in what a stop string holds back or past it."""
    text = "¡Así! 漢字 and 😀 or é: 日本 😀😀"
    free, end = await run(engine, make_task(engine, text, max_tokens=LENGTH, sampling=GREEDY))
    ids, said = [token.id for token in free], [token.text for token in free]
    for cut in range(1, len(ids) + 1):
        begun = tuple(ids[:cut])
        rest, finish = await run(engine, make_task(engine, text, max_tokens=LENGTH - cut, sampling=GREEDY, begun=begun))
        whole = b"".join(token.raw for token in [*free[:cut], *rest]).decode("utf-8", "replace")
        assert "".join([*said[:cut], *(token.text for token in rest)]) + finish.text == whole
        assert (finish.reason, finish.completion_tokens) == ("length", LENGTH - cut)
        assert finish.prompt_tokens == end.prompt_tokens + cut


async def test_a_stop_string_that_was_begun(engine: Engine, make_task: MakeTask, run: Run) -> None:
    free, end = await run(engine, make_task(engine, max_tokens=24, sampling=GREEDY))
    text = "".join(token.text for token in free) + end.text
    stop = text[5:13]
    whole = text[: text.index(stop)]
    tokens, _ = await run(engine, make_task(engine, max_tokens=24, sampling=GREEDY, stop=(stop,)))
    for cut in range(1, len(tokens) + 1):
        begun = tuple(token.id for token in tokens[:cut])
        task = make_task(engine, max_tokens=24 - cut, sampling=GREEDY, stop=(stop,), begun=begun)
        rest, finish = await run(engine, task)
        assert "".join(token.text for token in [*tokens[:cut], *rest]) + finish.text == whole
        assert finish.reason == "stop"
    assert rest == []  # all of it was there: nothing is sampled for the end alone


async def test_what_cannot_have_been_begun(engine: Engine, make_task: MakeTask) -> None:
    eos = engine.model.eos
    assert eos is not None
    for begun in [(engine.model.n_vocab,), (-1,), (eos.id,)]:
        with pytest.raises(TaskRefused) as caught:
            engine.submit(make_task(engine, begun=begun))
        assert caught.value.field == "begun"


async def test_choices_are_taken_together_or_not_at_all(engine: Engine, make_task: MakeTask) -> None:
    first = make_task(engine, max_tokens=2)
    good = [dataclasses.replace(first, id=f"{first.id}.{i}", group=first.id) for i in range(3)]
    with pytest.raises(TaskRefused):
        engine.submit_all([*good, dataclasses.replace(first, id=f"{first.id}.9", max_tokens=0)])
    streams = engine.submit_all(good)  # none of these ids is in use
    assert [sum(isinstance(event, Token) for event in [e async for e in stream]) for stream in streams] == [2, 2, 2]
