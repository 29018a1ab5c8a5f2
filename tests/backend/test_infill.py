"""Filling in a middle: `suffix` on `/v1/completions`, and `/infill` in the form of llama.cpp's server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from backend.posting import TEXT, post
from lacre.asgi import App, Call
from lacre_backend.api.app import create_app
from lacre_backend.api.prompts import infill_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import ControlToken, InfillTokens
from parts.echo_engine import BOS, N_VOCAB, EchoEngine
from parts.tiny_model import tiny_model

INFILL = "/infill"
BEFORE, AFTER, MIDDLE, SEPARATOR = (ControlToken(N_VOCAB + i, f"<|fim_{name}|>") for i, name in enumerate("psmf"))
MARKS = InfillTokens(BEFORE, AFTER, MIDDLE, SEPARATOR)
BODY: dict[str, Any] = {"model": "code", "input_prefix": "def f():\n    return ", "input_suffix": "\n\nf()\n"}
SAID = BODY["input_prefix"] + BODY["input_suffix"]


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    with closing(EchoEngine(name="code", n_ctx=512)) as engine:
        engine.model = dataclasses.replace(engine.model, infill=MARKS, n_vocab=N_VOCAB + 4)
        yield engine


@pytest.fixture
def coder(engine: EchoEngine) -> App:
    return create_app([engine])


async def test_the_model_s_tokens_stand_around_the_texts(engine: EchoEngine) -> None:
    served = ServedModel(engine)
    ids = await infill_prompt(served, "a", "b", "suffix")
    assert ids == [BOS.id, BEFORE.id, *b"a", AFTER.id, *b"b", MIDDLE.id]
    ids = await infill_prompt(served, "a", "", "suffix", files=[("x.py", "1"), ("y.py", "2")], begun_with="c")
    others = [SEPARATOR.id, *b"x.py\n1", SEPARATOR.id, *b"y.py\n2"]
    assert ids == [BOS.id, *others, BEFORE.id, *b"a", AFTER.id, MIDDLE.id, *b"c"]


async def test_no_text_becomes_one_of_them(engine: EchoEngine) -> None:
    typed = "".join(mark.text for mark in (BEFORE, AFTER, MIDDLE, SEPARATOR))
    ids = await infill_prompt(ServedModel(engine), typed, typed, "suffix", files=[(typed, typed)])
    assert [ids.count(mark.id) for mark in (BEFORE, AFTER, MIDDLE, SEPARATOR)] == [1, 1, 1, 1]


async def test_a_suffix(coder: App) -> None:
    body = {"model": "code", "prompt": BODY["input_prefix"], "suffix": BODY["input_suffix"], "max_tokens": 100}
    reply = (await post(coder, TEXT, body)).json()
    assert (reply["choices"][0]["text"], reply["usage"]["prompt_tokens"]) == (SAID, len(SAID) + 4)
    both = (await post(coder, TEXT, body | {"prompt": ["x", "y"], "suffix": "z"})).json()
    assert [choice["text"] for choice in both["choices"]] == ["xz", "yz"]
    for nothing in ("", None):
        assert (await post(coder, TEXT, body | {"suffix": nothing})).json()["choices"][0]["text"] == BODY["input_prefix"]
    refused = await post(coder, TEXT, body | {"prompt": [97, 98]})
    assert refused.error(400)["param"] == "suffix"


async def test_infill_whole(coder: App) -> None:
    reply = (await post(coder, INFILL, BODY)).json()
    assert reply == {
        "index": 0, "content": SAID, "stop": True, "model": "code", "tokens_predicted": len(SAID),
        "tokens_evaluated": len(SAID) + 4, "tokens_cached": 0, "truncated": False, "stop_type": "eos", "stopping_word": "",
    }  # fmt: skip
    cut = (await post(coder, INFILL, BODY | {"n_predict": 3})).json()
    assert (cut["content"], cut["stop_type"]) == ("def", "limit")
    stopped = (await post(coder, INFILL, BODY | {"stop": ["return"]})).json()
    assert (stopped["content"], stopped["stop_type"], stopped["stopping_word"]) == ("def f():\n    ", "word", "return")


async def test_infill_streamed(coder: App) -> None:
    reply = await post(coder, INFILL, BODY | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(piece[len(b"data: ") : -2]) for _, piece in reply.pieces]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert "".join(event["content"] for event in events) == SAID
    assert (events[-1]["tokens_predicted"], events[-1]["stop_type"]) == (len(SAID), "eos")


@pytest.mark.parametrize(
    "members",
    [
        {"cache_prompt": True, "id_slot": 0, "samplers": ["top_k", "top_p", "infill"], "t_max_predict_ms": 500,
         "t_max_prompt_ms": 500, "response_fields": ["content"], "timings_per_token": False, "n_probs": 0, "n_indent": 0},
        {"n_predict": -1, "seed": -1, "input_extra": []},
        {"temperature": 0.1, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.1},
    ],
)  # fmt: skip
async def test_what_editors_send_is_taken(coder: App, members: dict[str, Any]) -> None:
    assert (await post(coder, INFILL, BODY | members)).json()["content"] == SAID


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"n_probs": 3}, "n_probs"), ({"n_indent": 4}, "n_indent"), ({"max_tokens": 3}, "max_tokens"), ({"n": 2}, "n"),
        ({"grammar": "root ::= x"}, "grammar"), ({"n_predict": 0}, "n_predict"), ({"input_prefix": 3}, "input_prefix"),
        ({"input_extra": [{"filename": "x"}]}, "input_extra[0].text"), ({"input_extra": [{"text": 1}]}, "input_extra[0].text"),
        ({"cache_prompt": "yes"}, "cache_prompt"), ({"id_slot": "one"}, "id_slot"), ({"prompt": ["a"]}, "prompt"),
        ({"input_suffix": "x" * 600}, "input_prefix"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_is_refused_by_name(coder: App, members: dict[str, Any], param: str) -> None:
    assert (await post(coder, INFILL, BODY | members)).error(400)["param"] == param


async def test_other_models_refuse_by_name(app: App) -> None:
    refused = (await post(app, TEXT, {"model": "echo", "prompt": "a", "suffix": "b"})).error(400)
    assert (refused["param"], refused["code"]) == ("suffix", "unsupported_value")
    refused = (await post(app, INFILL, BODY | {"model": "echo"})).error(400)
    assert (refused["param"], refused["code"]) == ("input_prefix", "unsupported_value")
    assert "cannot fill in a middle" in refused["message"]


async def test_the_grant_holds(coder: App) -> None:
    call = Call("c1", action="complete", model="code", max_tokens=5, max_prompt_tokens=100)
    assert (await post(coder, INFILL, BODY, call=call)).json()["content"] == SAID[:5]
    assert (await post(coder, INFILL, BODY | {"n_predict": 6}, call=call)).error(403)["param"] == "n_predict"
    other = Call("c1", action="chat", model="code", max_tokens=5, max_prompt_tokens=100)
    assert (await post(coder, INFILL, BODY, call=other)).error(403)["param"] == "action"


def test_a_file_s_tokens_are_read(tmp_path: Path) -> None:
    """As GGUF names them. A file that names only some cannot do it."""
    names = {name: f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "sep")}
    whole = {names["pre"]: 10, names["suf"]: 11, names["mid"]: 12}
    for more, ids in (
        (whole, (10, 11, 12, None)),
        (whole | {names["sep"]: 13}, (10, 11, 12, 13)),
        ({names["pre"]: 10, names["suf"]: 11}, None),
        ({}, None),
    ):
        path = tiny_model(tmp_path / "tiny.gguf", more=more)
        settings = LlamaSettings(n_ctx=256, threads=1, slots=1)
        with closing(LlamaEngine(path, name="tiny", digest="", settings=settings)) as engine:
            found = engine.model.infill
            read = found and (found.before.id, found.after.id, found.middle.id, found.separator and found.separator.id)
            assert read == ids
