"""Lists whose items differ (`uniqueItems`): those of any text or number, which the engine reads beside the grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.generating import make_task, run
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.engine.distinct import Watch, split
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Sampling
from parts.drawing import drawn

TEXTS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
NUMBERS = {"type": "array", "items": {"type": "number"}, "uniqueItems": True}


def grammar(schema: dict[str, Any]) -> str:
    grammars = Grammars()
    return grammars.text(f"start: {grammars.schema(schema, 'response_format', alone=True)}\n")


def objects(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def watch(*paths: str) -> Watch:
    return Watch(split("".join(f"//distinct {path}\n" for path in paths) + "start: TEXT")[1])


# Where the list is; answers in which its items differ, and some that repeat one.
ANSWERS: dict[str, tuple[list[str], list[str]]] = {
    "/a": (
        [
            '{"a": ["x", "y"]}', '{"b": ["x", "x"], "a": []}', '{"a": ["x"], "b": {"a": ["x", "x"]}}', '{"a": [1,10 , 100]}',
            '{"a": ["a,b", "a]", "\\\\\\"", "\\\\"]}', '{"a": ["\\\\n", "\\n"]}', '{"a": [true, true, null, null]}',
            '{"a": [0, 1, 0', '{"a": [1, 0e',
        ],
        [
            '{"a": ["x", "x"]}', '{"a": ["x", "y", "x"]}', '{"a": [1, 2, 1.0]}', '{"a": ["\\"", "\\""]}',
            '{"a": ["\\n", "\\u000A"]}', '{"a": ["\\ud83c\\udf0a", "🌊"]}', '{"a": [0, 1, 0e',
        ],
    ),
    "/b/a": ([], ['{"b": {"a": ["x", "x"]}}']),
    "/*/a": (['[{"a": ["x"]}, {"a": ["x"]}]'], ['[{"a": ["x"]}, {"a": ["x", "x"]}]']),
    "/a%2Fb%22": ([], ['{"a/b\\"": ["x", "x"]}']),
    "/a%2Fb%5C%22": (['{"a/b\\"": ["x", "x"]}'], []),
    "/a%0A": ([], ['{"a\\u000a": ["x", "x"]}']),
    "": (['[["x", "x"]]', '{"": ["x", "x"]}'], ['["x", "x"]']),
    "/": ([], ['{"": ["x", "x"]}']),
    "/a/#": (['{"b": [0, 0'], ['{"a": [0, 1, 0', '{"a": [0, -1, 10, -0']),
    "/%2A": (['{"b": ["x", "x"]}'], ['{"*": ["x", "x"]}']),
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "answer", "new"),
    [(path, answer, answers is different) for path, (different, repeated) in ANSWERS.items()
     for answers in (different, repeated) for answer in answers],
)  # fmt: skip
def test_repeated_items_are_told(path: str, answer: str, new: bool) -> None:
    assert watch(path).feed(answer.encode()) == new


@given(
    lists=st.lists(st.lists(st.text(max_size=2) | st.integers(-3, 3), max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60)),
)
def test_where_an_answer_is_cut_changes_nothing(lists: list[list[object]], cuts: list[int]) -> None:
    """And a probe changes nothing of the watch."""
    answer = json.dumps({"a": lists}).encode()
    new, begin, read = True, 0, watch("/a/*")
    for end in [*sorted({min(cut, len(answer)) for cut in cuts}), len(answer)]:
        probed = read.probe().feed(answer[begin:end])
        assert read.feed(answer[begin:end]) == probed
        new, begin = new and probed, end
    assert new == all(len({(type(x) is str, x) for x in each}) == len(each) for each in lists)


def test_what_is_drawn_has_no_repeated_items() -> None:
    schema = objects(tags={**TEXTS, "minItems": 3, "maxItems": 6}, inner=objects(**{"a/b": {**NUMBERS, "minItems": 4}}))
    schema["properties"]["refers"] = {"$ref": "#/$defs/Set"}
    schema["$defs"] = {"Set": {"anyOf": [TEXTS, {"type": "null"}]}}
    source = grammar(schema)
    assert split(source)[1] == {(b"tags",), (b"inner", b"a/b"), (b"refers",)}
    for seed in range(6):
        value = json.loads(drawn(source, seed))
        for each in (value["tags"], value["inner"]["a/b"]):
            assert len(each) == len(set(each)) >= 3


NODE = objects(tags=TEXTS, next={"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]})
ITEMS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 4}, {"type": "integer", "maximum": 1000}, {"type": "string", "format": "date"},
    {"type": "array"}, {},
]  # fmt: skip


@pytest.mark.parametrize(
    "schema",
    [
        *({**TEXTS, "items": items} for items in ITEMS),
        {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
        {"type": "object", "patternProperties": {"^a": TEXTS}},
    ],
)
def test_where_they_cannot_be_told_the_schema_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused, match="'uniqueItems' at #"):
        grammar(schema)
    grammars = Grammars()
    loose = grammars.text(f"start: {grammars.schema(schema, 'response_format', strict=False, alone=True)}\n")
    assert not split(loose)[1]


@pytest.mark.parametrize("kind", ["string", "number", "integer"])
def test_a_list_may_be_the_whole_answer(kind: str) -> None:
    """And none comes to where a zero would have to be there twice."""
    source = grammar({**TEXTS, "items": {"type": kind}, "minItems": 3, "maxItems": 8})
    for seed in range(30):
        value = json.loads(drawn(source, seed))
        assert len(value) == len(set(value)) >= 3


def beside(items: dict[str, Any]) -> list[dict[str, Any]]:
    """Schemas in which a list of these items may stand where one of other texts does, and in which both do."""
    plain = {"type": "array", "items": items, "minItems": 3, "maxItems": 3}
    union = [objects(kind={"const": "a"}, v=TEXTS), objects(kind={"const": "b"}, v=plain)]
    return [{"anyOf": union}, {**objects(v=plain), "additionalProperties": TEXTS}]


@pytest.mark.parametrize("kind", ["boolean", "null", "integer", "string", "object"])
def test_a_list_in_its_place_may_repeat_what_it_likes(kind: str) -> None:
    for schema in beside({"type": kind}):
        for seed in range(4):
            json.loads(drawn(grammar(schema), seed))


@pytest.mark.parametrize("items", [{"enum": ["x"]}, {"type": "string", "maxLength": 1}])
def test_a_list_in_its_place_that_must_repeat_is_refused(items: dict[str, Any]) -> None:
    for schema in beside(items):
        with pytest.raises(RequestRefused, match="'uniqueItems' at #"):
            grammar(schema)


async def test_a_model_that_repeats_itself_does_not(llama: LlamaEngine) -> None:
    prompt = 'Write JSON. {"tags": ["sea", "sea", "sea", "sea", "sea"]}\n{"tags": ["sea", "sea", "sea", "sea", "sea"]}\n'

    async def tags(unique: bool, before: str = "") -> list[str]:
        begun = tuple(llama.tokenize(before)) if before else ()
        source = grammar(objects(tags={**TEXTS, "uniqueItems": unique, "minItems": 4, "maxItems": 4}))
        sampling = Sampling(temperature=0, grammar=llama.grammar(source, begun))
        task = make_task(llama, prompt, max_tokens=80, sampling=sampling, endless=False, begun=begun)
        tokens, finish = await run(llama, task)
        return json.loads(before + "".join(token.text for token in tokens) + finish.text)["tags"]  # type: ignore[no-any-return]

    assert len(set(await tags(False))) < 4, "or this shows nothing"
    assert len(set(await tags(True))) == 4
    resumed = await tags(True, '{"tags": ["sea", "se')
    assert len(set(resumed)) == 4 and resumed[0] == "sea"
