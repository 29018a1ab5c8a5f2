"""`lacre model choose --examples`: what counts as right, and which files of examples are refused, by line."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parts.tiny_model import TEMPLATE, tiny_model, tiny_reranker
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.measure import commands
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.protocol import Embedding, Task, TaskKind
from lacre_backend.workshop.child import run
from lacre_backend.workshop.examples import MOST_BYTES, MOST_EXAMPLES, Examples, ModelTask, normalized, read_examples
from lacre_backend.workshop.judging import (
    ANSWERS,
    JUDGE,
    LOSS,
    JudgeAsked,
    LossAsked,
    Miss,
    ReferenceAnswer,
    Score,
    rank_correlation,
)

QUESTION = {"prompt": "hello"}


def written(path: Path, *examples: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in examples))
    return path


def judged(model: Path, task: ModelTask, *examples: dict[str, Any]) -> Score:
    return run(JUDGE, JudgeAsked(model, read_examples(written(model.parent / "examples", *examples), task)))


def own_answers(model: Path, *examples: dict[str, Any]) -> list[ReferenceAnswer]:
    asked = JudgeAsked(model, read_examples(written(model.parent / "examples", *examples), ModelTask.CHAT))
    return run(ANSWERS, asked).answers


def text_of(answer: ReferenceAnswer, most: int) -> str:
    """Of the tiny vocabulary: a token for each byte, after three others."""
    return bytes(token - 3 for token in answer.answer[:most] if 3 <= token < 259).decode("utf-8", "replace")


@pytest.fixture
def answering(tmp_path: Path) -> Path:
    """A model that answers everything with `yes`: the weights of its last token win, whatever it reads."""
    return tiny_model(tmp_path / "yes.gguf", says="yes")


def test_chat_is_judged_by_exact_match(answering: Path) -> None:
    right = {**QUESTION, "expected": ["no", " “YES”. "]}
    wrong = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "expected": "yes, sir"}
    found = judged(answering, ModelTask.CHAT, right, wrong, {**QUESTION, "expected": "yes"})
    assert (found.measure, found.value, found.examples) == ("exact match", 0.6667, 3)
    assert found.missed == [Miss(2, "yes")]


def test_a_model_without_a_template_takes_prompts_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "base.gguf", template="", says="yes")
    assert judged(model, ModelTask.CHAT, {**QUESTION, "expected": "yes"}).value == 1
    with pytest.raises(SettingsError, match="line 2: the model has no chat template"):
        judged(
            model,
            ModelTask.CHAT,
            {**QUESTION, "expected": "a"},
            {"messages": [{"role": "user", "content": "b"}], "expected": "a"},
        )


def test_an_example_that_does_not_fit_is_an_error_with_its_line(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf", n_ctx=256)
    with pytest.raises(SettingsError, match=r"line 2: .*256"):
        judged(model, ModelTask.CHAT, {**QUESTION, "expected": "a"}, {"prompt": "b" * 300, "expected": "a"})


def test_the_loss_counts_on_the_answers_of_the_reference(tmp_path: Path) -> None:
    one, other = tiny_model(tmp_path / "a.gguf"), tiny_model(tmp_path / "b.gguf", seed=2)
    found = own_answers(one, QUESTION, {"prompt": "given", "expected": "abc"})
    assert 0 < len(found[0].answer) <= 64
    assert text_of(found[1], 3) == "abc"
    same, apart = (run(LOSS, LossAsked(one, model, found)) for model in (one, other))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert apart.kl > 0.02
    assert same.tokens == sum(len(each.answer) for each in found)


def test_an_embedding_model_is_judged_by_what_is_nearest(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "embed.gguf", embeds=True)
    hit = {"text": "the harbour", "nearest": "the harbour.", "others": ["0123456789"]}
    miss = {"text": "the harbour", "nearest": "0123456789", "others": ["the harbour."]}
    found = judged(model, ModelTask.EMBED, hit, miss)
    assert (found.measure, found.value, found.missed) == ("hit rate", 0.5, [Miss(2, "the harbour.")])
    without = ({"text": "the harbour", "nearest": "the harbour."}, {"text": "0123456789", "nearest": "012345678"})
    assert judged(model, ModelTask.EMBED, *without).value == 1


def test_pairs_are_judged_by_the_order_of_their_similarities(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "embed.gguf", embeds=True)
    texts = [("the harbour", other) for other in ("the harbour", "the harbour.", "a light", "0123456789")]
    cosines = [float(np.dot(*vectors(model, *pair))) for pair in texts]
    pairs = [{"text": one, "other": two, "similarity": 5 * cosine} for (one, two), cosine in zip(texts, cosines, strict=True)]
    found = judged(model, ModelTask.EMBED, *pairs)
    assert (found.measure, found.value) == ("rank correlation", 1)
    for pair in pairs:
        pair["similarity"] = -pair["similarity"]  # type: ignore[operator]
    assert judged(model, ModelTask.EMBED, *pairs).value == -1


def vectors(model: Path, *texts: str) -> list[tuple[float, ...]]:
    async def embedded(engine: LlamaEmbedder) -> list[tuple[float, ...]]:
        before, after = engine.model.frame
        found = []
        for text in texts:
            task = Task("t", (*before, *engine.tokenize(text), *after), 1, TaskKind.EMBED)
            found += [event.values async for event in engine.submit(task) if isinstance(event, Embedding)]
        return found

    with closing(LlamaEmbedder(model, name="m", digest="")) as engine:
        return asyncio.run(embedded(engine))


@pytest.mark.parametrize("template", [None, "<s>{query}</s>{document}</s>"])
def test_a_reranker_is_judged_by_its_first_document(tmp_path: Path, template: str | None) -> None:
    model = tiny_reranker(tmp_path / "rank.gguf", template=template)
    documents = ["a harbour", "some light", "0123456789"]
    found = [judged(model, ModelTask.RERANK, *({"query": "q", "documents": documents, "right": n} for n in range(3)))]
    found.append(judged(model, ModelTask.RERANK, *({"query": "q", "documents": documents, "right": d} for d in documents)))
    assert found[0].missed == found[1].missed  # by number and by text
    assert len(found[0].missed) == 2
    (first,) = {miss.got for miss in found[0].missed}  # the same for all, since the query is
    assert documents.index(first) + 1 not in {miss.line for miss in found[0].missed}
    assert (found[0].tokens_per_second or 0) > 0
    with pytest.raises(SettingsError, match="line 1: the query and a document have"):
        judged(model, ModelTask.RERANK, {"query": "q" * 500, "documents": documents, "right": 0})


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  Yes.\n", "yes"),
        ("“Sim!”", "sim"),
        ("**42**", "42"),
        ("-5", "-5"),
        (".5", ".5"),
        ("ＡＢＣ", "abc"),
        ("a \n b", "a b"),
    ],
)
def test_answers_are_compared_without_their_dress(text: str, same: str) -> None:
    assert normalized(text) == same


def test_equal_values_share_a_rank() -> None:
    one, other = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(one, other) == pytest.approx(0.9486833)  # SciPy's spearmanr
    assert rank_correlation(one, np.ones(4)) == 0


WRONG = [
    ("chat", '{"prompt": "a", "expected": "b"}\n{"prompt": "a",\n', "Line 2 .*no JSON object"),
    ("chat", "[]\n", "Line 1 .*no JSON object"),
    ("chat", "\n\n" + "[" * 100_000, "Line 3 .*no JSON object"),
    ("chat", b'{"prompt": "\xff"}', "Line 1 .*not UTF-8"),
    ("chat", '{"prompt": "a", "expcted": "b"}', "Line 1 .*`expcted`: .*no such member"),
    ("chat", '{"prompt": "a", "line": 4, "expected": "b"}', "Line 1 .*`line`"),
    ("chat", '{"prompt": 5, "expected": "b"}', "Line 1 .*`prompt`"),
    ("chat", '{"expected": "b"}', "either `prompt` or `messages`"),
    ("chat", '{"messages": [{"role": "robot", "content": "a"}], "expected": "b"}', "Line 1 .*`messages.0.role`"),
    ("chat", '{"messages": [{"role": "assistant", "content": "a"}]}', "give that answer as `expected`"),
    ("chat", '{"prompt": "a", "expected": "..."}', "without a letter"),
    ("embed", '{"text": "a", "nearest": "b"}', "give `others`"),
    ("embed", '{"text": "a", "other": "b", "similarity": 1}', "all pairs have the same"),
    ("embed", '{"text": "a", "other": "b", "similarity": NaN}', "Line 1 .*`similarity`"),
    ("embed", '{"text": "a", "nearest": "b", "others": ["c"]}\n{"text": "a", "other": "b", "similarity": 1}', "Line 2 of"),
    ("rerank", '{"query": "a", "documents": ["b"], "right": 0}', "Line 1 .*`documents`"),
    ("rerank", '{"query": "a", "documents": ["b", "c"], "right": 2}', "numbered 0 to 1"),
    ("rerank", '{"query": "a", "documents": ["b", "c"], "right": "d"}', "none of the documents"),
    ("chat", "", "has no example"),
    ("chat", b" " * (MOST_BYTES + 1), "larger than 16 MiB"),
    ("chat", '{"prompt": "a", "expected": "b"}\n' * (MOST_EXAMPLES + 1), "at most 1,000"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "text", "said"), WRONG, ids=range(len(WRONG)))
def test_wrong_examples_are_refused_by_their_line(tmp_path: Path, task: str, text: str | bytes, said: str) -> None:
    path = tmp_path / "examples"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=said):
        read_examples(path, ModelTask(task))


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "examples"
    path.write_text('\ufeff{"prompt": "a", "expected": "b"}\r\n\r\n{"prompt": "c", "expected": ["d", "e"]}')
    found = read_examples(path, ModelTask.CHAT)
    assert [(each.line, each.prompt, each.expected) for each in found.chat] == [(1, "a", ("b",)), (3, "c", ("d", "e"))]
    assert found == Examples(chat=found.chat)


def test_the_best_on_the_examples_is_chosen(tmp_path: Path) -> None:
    """Rerankers are not measured otherwise, so this needs seconds."""
    folder = tmp_path / "models"
    folder.mkdir()
    models = [tiny_reranker(folder / f"{seed}.gguf", seed=seed) for seed in (1, 2)]
    documents = ["a harbour", "some light", "0123456789", "the sea", "a ship"]
    examples = [{"query": f"q{n}", "documents": documents, "right": 0} for n in range(12)]
    scores = [judged(model, ModelTask.RERANK, *examples).value for model in models]
    assert scores[0] != scores[1], "give other seeds"
    path = written(tmp_path / "examples.jsonl", *examples)
    options = ["--task", "rerank", "--examples", str(path)]
    printed = CliRunner().invoke(commands, ["choose", str(folder), *options, "--json"])
    assert printed.exit_code == 0, printed.output
    told = json.loads(printed.stdout)
    best = models[scores.index(max(scores))]
    assert told["chosen"] == str(best)
    assert [each["score"]["value"] for each in told["candidates"]] == sorted(scores, reverse=True)
    bound = (max(scores) + min(scores)) / 2
    printed = CliRunner().invoke(commands, ["choose", str(folder), *options, "--min-score", str(bound)])
    assert f"its score is below {bound}" in printed.stdout
    assert "The score is the hit rate on 12 examples." in printed.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-score", "0.5"], "Give it with --examples"),
        (["--examples", "x", "--no-measure"], "Leave --no-measure away"),
        (["--examples", "x", "--min-score", "90"], "at most 1"),
        (["--examples", "x"], "has no `expected`"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, options: list[str], said: str) -> None:
    tiny_model(tmp_path / "tiny.gguf", template=TEMPLATE)
    given = [str(written(tmp_path / "x", QUESTION)) if option == "x" else option for option in options]
    printed = CliRunner().invoke(commands, ["choose", str(tmp_path), *given])
    assert said in str(printed.exception)
