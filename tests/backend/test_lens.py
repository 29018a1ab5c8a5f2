"""The logit lens: what each layer would say, beside streams that must not notice it; and its place in `/v1/explain`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, made, make_task, rest_of, run
from backend.posting import post
from backend.test_explain import PATH, parts
from lacre.asgi import Call
from lacre.wire.outer import MAX_LENS_LAYERS, MAX_LENS_TOKENS
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import (
    Engine,
    EngineError,
    Event,
    Finish,
    LensUnsupported,
    PromptProgress,
    Task,
    TaskRefused,
    Token,
)
from parts.echo_engine import LAYERS, UNLIKELY, EchoEngine
from parts.tiny_model import N_EMBD, N_LAYER, tiny_lora, tiny_model, tiny_recurrent_model
from parts.waiting import until

PROMPT, ANSWER = "The capital of France is", " Paris. It is large"
TINY = LlamaSettings(n_ctx=1024, threads=1)


def lens_task(engine: Engine, prompt: str = PROMPT, answer: str = ANSWER, *, lens: int = 8, **fields: Any) -> Task:
    given = tuple(engine.tokenize(answer))
    return make_task(engine, prompt, len(given), sampling=GREEDY, endless=False, given=given, lens=lens, **fields)


def load(path: Path, **options: Any) -> LlamaEngine:
    return LlamaEngine(path, name="tiny", digest="sha256:0", settings=TINY, **options)


@pytest.fixture
def small(tiny: Path) -> Iterator[LlamaEngine]:
    with closing(load(tiny)) as engine:
        yield engine


async def test_the_last_layer_says_what_the_model_says(llama: LlamaEngine) -> None:
    seen = await run(llama, lens_task(llama))
    scored = await run(llama, replace(lens_task(llama), lens=0, logprobs=0))
    assert (seen.ids, seen.text) == (scored.ids, ANSWER)
    for one, other in zip(seen.tokens, scored.tokens, strict=True):
        assert [view.layer for view in one.layers] == [0, 4, 8, 12, 17, 21, 25, 29]
        assert one.logprob == pytest.approx(other.logprob, abs=0.1)
        assert one.layers[-1].logprob == pytest.approx(other.logprob, abs=0.1)
    paris = seen.tokens[0].layers
    assert (paris[-1].rank, paris[-1].says) == (1, b" Paris")
    assert paris[0].rank > 100 and paris[0].says != b" Paris", "an early layer knows nothing of it yet"


@pytest.mark.parametrize(("lens", "layers"), [(1, [29]), (2, [0, 29]), (64, list(range(30)))])
async def test_layers_are_spread_and_have_the_last(llama: LlamaEngine, lens: int, layers: list[int]) -> None:
    seen = await run(llama, lens_task(llama, answer=" Paris", lens=lens))
    assert [view.layer for view in seen.tokens[0].layers] == layers


async def test_long_prompts_and_answers_are_read_in_pieces(small: LlamaEngine) -> None:
    task = lens_task(small, "red. green. " * 40, "blue. yellow. " * 8)
    events = await rest_of(small.submit(task))
    read = [event.prompt_tokens for event in events if isinstance(event, PromptProgress)]
    assert read[-1] == len(task.prompt) - 1 and len(read) > 3
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.id for token in tokens] == list(task.given)
    assert events[-1] == Finish("length", len(task.prompt), 0, len(task.given), "")
    assert {tuple(view.layer for view in token.layers) for token in tokens} == {tuple(range(N_LAYER))}
    assert small.held == (0, 0)


async def test_streams_beside_it_say_the_same(small: LlamaEngine) -> None:
    """Greedy streams with a lens between their steps, and the lens beside them, equal each alone."""
    texts = ["red. ", "green. green. ", "blue. " * 30]
    alone = [await made(small, text, 48, sampling=GREEDY) for text in texts]
    seen = await run(small, lens_task(small, "red. " * 20, "green"))
    together = await asyncio.gather(
        run(small, lens_task(small, "red. " * 20, "green")), *(made(small, text, 48, sampling=GREEDY) for text in texts)
    )
    assert [stream.ids for stream in together[1:]] == [stream.ids for stream in alone]
    for one, other in zip(together[0].tokens, seen.tokens, strict=True):
        assert [view.rank for view in one.layers] == [view.rank for view in other.layers]


async def test_a_stream_goes_on_between_its_pieces(small: LlamaEngine) -> None:
    """Each of a stream's tokens waits for a piece at most: a lens of many pieces does not come first as a whole."""
    order: list[str] = []

    async def noted(name: str, stream: AsyncIterator[Event]) -> None:
        async for event in stream:
            order.append(name if isinstance(event, Token | PromptProgress) else f"{name}!")

    stream = small.submit(make_task(small, "red. ", 200, sampling=GREEDY))
    first = await anext(stream)
    assert isinstance(first, Token)
    lens = small.submit(lens_task(small, "green. " * 100, "blue. " * 5, lens=2))
    await asyncio.gather(noted("stream", stream), noted("lens", lens))
    between = order[order.index("lens") : order.index("lens!")]
    assert between.count("stream") >= 10


async def test_callers_take_turns(small: LlamaEngine) -> None:
    """One's third lens waits for another's first."""
    ended: list[str] = []

    async def one(caller: str, stream: AsyncIterator[Event]) -> None:
        await rest_of(stream)
        ended.append(caller)

    callers = ["a", "a", "a", "b"]
    streams = small.submit_all([lens_task(small, "red. " * 10, "green", fair=("t", caller)) for caller in callers])
    await asyncio.gather(*map(one, callers, streams))
    assert ended == ["a", "b", "a", "a"]
    assert small.held == (0, 0)


@pytest.mark.parametrize("waits", [False, True])
async def test_cancelled(small: LlamaEngine, waits: bool) -> None:
    first, second = (lens_task(small, "red. " * 100, "blue. " * 5) for _ in range(2))
    streams = small.submit_all([first, second])
    await anext(streams[0])
    small.cancel(second.id if waits else first.id)
    ends = [(await rest_of(stream))[-1] for stream in streams]
    assert [end.reason for end in ends if isinstance(end, Finish)] == (
        ["length", "cancelled"] if waits else ["cancelled", "length"]
    )
    assert small.held == (0, 0)


async def test_its_time_ends(small: LlamaEngine) -> None:
    assert (await run(small, lens_task(small, time_limit=0.0))).finish.reason == "length"
    assert small.held == (0, 0)


async def test_closing_ends_it(tiny: Path) -> None:
    engine = load(tiny)
    stream = engine.submit(lens_task(engine, "red. " * 100, "blue. " * 5))
    await anext(stream)
    engine.close()
    end = (await rest_of(stream))[-1]
    assert isinstance(end, Finish) and end.reason == "cancelled"


async def test_it_uses_the_adapter(tmp_path: Path, tiny: Path) -> None:
    from lacre_backend.engine.adapters import AdapterFile  # noqa: PLC0415

    adapter = AdapterFile("x", tiny_lora(tmp_path / "x.gguf", seed=2), "sha256:1")
    with closing(load(tiny, adapters=[adapter])) as engine:
        [adapted] = engine.adapted
        seen, plain = await run(adapted, lens_task(adapted)), await run(engine, lens_task(engine))
        scored = await run(adapted, replace(lens_task(adapted), lens=0, logprobs=0))
    for one, other, base in zip(seen.tokens, scored.tokens, plain.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.01) != pytest.approx(base.logprob, abs=0.001)


async def test_recurrent_models_have_layers_too(tmp_path: Path) -> None:
    with closing(load(tiny_recurrent_model(tmp_path / "tiny.gguf"))) as engine:
        seen = await run(engine, lens_task(engine))
    assert [view.layer for view in seen.tokens[-1].layers] == list(range(N_LAYER))


async def test_what_the_layers_do_not_explain_is_refused(tmp_path: Path) -> None:
    """A file whose last layer's state gives no numbers at all: the check of the last layer must not pass."""
    path = tiny_model(tmp_path / "nan.gguf", tensors={"output_norm.weight": np.full(N_EMBD, np.nan)})
    with closing(load(path)) as engine:
        with pytest.raises(LensUnsupported):
            await run(engine, lens_task(engine))
        assert engine.held == (0, 0)


def test_only_given_answers(small: LlamaEngine) -> None:
    async def asked() -> None:
        with pytest.raises(TaskRefused):
            small.submit(make_task(small, lens=2))

    asyncio.run(asked())


# The API


class Unreadable(EchoEngine):
    """A model whose layers cannot be read, or which fails."""

    error: EngineError = LensUnsupported()

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        return [_failing(self.error)] if tasks[0].lens else super().submit_all(tasks)


async def _failing(error: EngineError) -> AsyncIterator[Event]:
    raise error
    yield


@pytest.fixture
def once() -> Iterator[EchoEngine]:
    with closing(EchoEngine(n_ctx=512)) as engine:
        yield engine


async def test_each_layer_of_each_token(once: EchoEngine) -> None:
    told = (await post(create_app([once]), PATH, parts("ab", "cd", answer="a?", lens=True))).json()
    assert told["lens"]["layers"] == list(range(LAYERS))
    sure, never = 1.0, pytest.approx(np.exp(UNLIKELY))
    assert told["lens"]["tokens"] == [
        {"text": "a", "ranks": [2, 2, 1], "probabilities": [never, never, sure], "says": ["?", "?", "a"]},
        {"text": "?", "ranks": [1, 1, 2], "probabilities": [sure, sure, never], "says": ["?", "?", "b"]},
    ]
    assert [part["drop"] > 0 for part in told["parts"]] == [True, False]


@pytest.mark.parametrize("lens", [False, None])
async def test_it_is_not_there_unless_asked_for(once: EchoEngine, lens: bool | None) -> None:
    body = parts("ab", answer="a") | ({} if lens is None else {"lens": lens})
    assert "lens" not in (await post(create_app([once]), PATH, body)).json()


async def test_an_answer_of_nothing_shows_nothing(once: EchoEngine) -> None:
    told = (await post(create_app([once]), PATH, parts("", lens=True))).json()
    assert told["lens"] == {"layers": [], "tokens": []}


async def test_only_the_first_tokens_and_all_of_it_is_counted(once: EchoEngine) -> None:
    weighed: list[int] = []
    call = Call("r", model="echo", action="lens", max_tokens=1, max_prompt_tokens=2000, weigh=weighed.append)
    answer = "a" * (MAX_LENS_TOKENS + 5)
    told = (await post(create_app([once]), PATH, parts("ab", answer=answer, lens=True), call=call)).json()
    assert (len(told["tokens"]), len(told["lens"]["tokens"])) == (len(answer), MAX_LENS_TOKENS)
    without = Call("r", model="echo", action="explain", max_tokens=1, max_prompt_tokens=2000)
    await post(create_app([once]), PATH, parts("ab", answer=answer), call=without)
    whole = (await post(create_app([once]), "/v1/tokenize", parts("ab"))).json()["count"]
    assert call.usage.prompt_tokens - without.usage.prompt_tokens == whole + MAX_LENS_TOKENS * (1 + LAYERS)
    assert weighed == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("granted", "body", "param"),
    [
        ({"action": "explain"}, {"lens": True}, "action"), ({"action": "lens"}, {}, "action"),
        ({"action": "lens"}, {"lens": False}, "action"),
        # the whole prompt twice and once without its part, the answer behind each of them, and the answer's layers
        ({"action": "lens", "max_prompt_tokens": 3 * 22 - 2 + 3 + MAX_LENS_LAYERS - 1}, {"lens": True}, "messages"),
    ],
)  # fmt: skip
async def test_no_more_than_was_granted(once: EchoEngine, granted: dict[str, Any], body: dict[str, Any], param: str) -> None:
    call = Call("r", **{"model": "echo", "max_tokens": 5, "max_prompt_tokens": 1000, **granted})
    reply = await post(create_app([once]), PATH, parts("ab", answer="a", **body), call=call)
    assert reply.error(403)["param"] == param
    assert (call.usage.prompt_tokens, once.running) == (0, 0)


async def test_as_much_as_was_granted(once: EchoEngine) -> None:
    call = Call("r", model="echo", action="lens", max_tokens=5, max_prompt_tokens=3 * 22 - 2 + 3 + MAX_LENS_LAYERS)
    assert (await post(create_app([once]), PATH, parts("ab", answer="a", lens=True), call=call)).status == 200


@pytest.mark.parametrize("lens", ["yes", 1, {}])
async def test_a_lens_is_true_or_false(once: EchoEngine, lens: Any) -> None:
    assert (await post(create_app([once]), PATH, parts("a", lens=lens))).error(400)["param"] == "lens"


async def test_a_model_without_readable_layers() -> None:
    with closing(Unreadable(n_ctx=512)) as engine:
        reply = await post(create_app([engine]), PATH, parts("ab", answer="a", lens=True))
        assert reply.error(400)["code"] == "lens_unsupported"
        engine.error = EngineError("broken")
        assert (await post(create_app([engine]), PATH, parts("ab", answer="a", lens=True))).error(500)["param"] is None


async def test_who_leaves_cancels_it(tiny: Path) -> None:
    with closing(load(tiny)) as engine:
        left = asyncio.Event()
        body = parts("ab" * 200, answer="c" * 60, model="tiny", lens=True)
        asking = asyncio.create_task(post(create_app([engine]), PATH, body, leaving=left))
        await until(lambda: engine.held[0])
        left.set()
        await asking
        await until(lambda: engine.held[0] == 0)


def test_it_changes_nothing_and_says_how_much_it_weighs() -> None:
    assert "lens" in REPEATABLE & WEIGHED
