"""`lacre model compare`: what its figures are worth, and which pairs it refuses."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.parts.tiny_model import tiny_model, tiny_recurrent_model, tiny_split_model, tiny_vocabulary
from typer.testing import CliRunner

from lacre.errors import SettingsError
from lacre_backend.commands.weights import commands
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tune import SLOTS
from lacre_backend.workshop.child import run
from lacre_backend.workshop.comparison import COMPARE, CompareAsked, Compared, compare
from lacre_backend.workshop.fidelity import LEAST, PREFACE, log_softmax, read_text
from lacre_backend.workshop.sealing import seal_model
from lacre_backend.workshop.speed import Speed, gain

pytestmark = pytest.mark.usefixtures("one_core")
WORDS = "The river rises above the town. " * 10


def compared(first: Path, second: Path, text: Path | None = None) -> Compared:
    return run(COMPARE, CompareAsked(first, second, text))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def one_by_one(path: Path, words: str) -> tuple[list[int], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """The text's tokens, and the logarithms of the probabilities after each, as the engine generates: a token a step."""
    with closing(Tokenizer(path)) as tokenizer:
        model = Model(path, name="m", digest="", n_ctx=512, gpu=Gpu(), tokenizer=tokenizer)
        assert model.info.bos is not None
        tokens = [model.info.bos.id, *model.tokenize(words, special=False)]
    context = LlamaContext(model, EngineLimits(slots=1, context=512, cells=512), Compute(1))
    rows = []
    for at, token in enumerate(tokens):
        context.execute(StepPlan((), (Segment(0, at, (token,), None, True),), (), (), 0))
        logits = context.logits(1)[0].astype(np.float64)
        rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    context.free()
    return tokens, np.array(rows)


def test_the_figures_are_those_of_the_definitions(tmp_path: Path, text: Path) -> None:
    """Recomputed from the logits of the engine itself."""
    paths = [tiny_model(tmp_path / f"{seed}.gguf", seed=seed, more={"tokenizer.ggml.add_bos_token": True}) for seed in (1, 2)]
    found = compared(*paths, text)
    (tokens, p), (_, q) = (one_by_one(path, WORDS) for path in paths)
    scored = slice(PREFACE, len(tokens) - 1)
    p, q = p[scored], q[scored]
    fidelity = found.second.fidelity
    assert fidelity.tokens == len(tokens) - 1 - PREFACE
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert fidelity.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert fidelity.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert fidelity.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    for logs, own in ((p, found.first), (q, found.second)):
        surprise = -logs[np.arange(len(logs)), tokens[PREFACE + 1 :]]
        assert own.fidelity.perplexity == pytest.approx(np.exp(surprise.mean()), rel=1e-3)
    assert set(found.second.speed.streams) == {*SLOTS}
    assert found.gain == pytest.approx(gain(found.second.speed, found.first.speed))
    assert min(found.gain, found.second.speed.prompt, *found.second.speed.streams.values()) > 0


def test_a_model_has_no_loss_to_itself(tmp_path: Path, text: Path) -> None:
    """Nor has a split one to the same in one file; nor one that keeps a state in place of cells."""
    whole, split = tiny_model(tmp_path / "tiny.gguf"), tiny_split_model(tmp_path, "split")
    assert compared(whole, split[1], text).second.fidelity.kl == 0
    recurrent = tiny_recurrent_model(tmp_path / "recurrent.gguf")
    found = compared(recurrent, recurrent, text).second
    assert (found.fidelity.kl, found.fidelity.same_top) == (0, 1)
    assert min(found.speed.streams.values()) > 0


def test_log_softmax_survives_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 1e4, 0.0], [-1e4, 0.0, 1.0]], np.float32))
    assert np.exp(rows).sum(-1) == pytest.approx([1, 1])
    assert rows[0, 0] == pytest.approx(-np.log(2))


def test_the_gain_is_the_geometric_mean() -> None:
    slow, fast = Speed(dict.fromkeys(SLOTS, 10.0), 100.0), Speed(dict.fromkeys(SLOTS, 20.0), 50.0)
    assert gain(fast, slow) == pytest.approx((2 ** len(SLOTS) / 2) ** (1 / (len(SLOTS) + 1)))


def test_the_text_that_ships_is_long_enough() -> None:
    assert len(read_text(None).split()) > 600


def refused(first: Path, second: Path, text: Path) -> None:
    """Without a child: none of these makes llama.cpp abort."""
    compare(CompareAsked(first, second, text), lambda _what, _share: None)


def test_other_vocabularies_are_refused(tmp_path: Path, text: Path) -> None:
    first = tiny_model(tmp_path / "first.gguf")
    fewer = tiny_model(tmp_path / "fewer.gguf", without=["\u2581"])
    with pytest.raises(SettingsError, match=r"first.gguf has 260 tokens, and .*fewer.gguf has 259"):
        refused(first, fewer, text)
    vocabulary = tiny_vocabulary("llama")
    vocabulary["tokenizer.ggml.tokens"][2] = "<end>"  # a control token, whose text no answer contains
    other = tiny_model(tmp_path / "other.gguf", vocabulary=vocabulary)
    with pytest.raises(SettingsError, match=r"Token 2 is '</s>' in .*first.gguf, and '<end>' in .*other.gguf"):
        refused(first, other, text)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"short", f"has 5 tokens, and {LEAST} are the least"),
        (b"\xff" * 200, "is not UTF-8"),
        (None, "No such text: "),
    ],
)
def test_texts_that_measure_nothing_are_refused(tmp_path: Path, text: Path, written: bytes | None, said: str) -> None:
    if written is None:
        text.unlink()
    else:
        text.write_bytes(written)
    model = tiny_model(tmp_path / "tiny.gguf")
    with pytest.raises(SettingsError, match=said):
        refused(model, model, text)


def test_models_that_cannot_be_measured_are_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    embeds = tiny_model(tmp_path / "embeds.gguf", embeds=True)
    sealed = tmp_path / "sealed"
    seal_model(model, sealed, f"file:{tmp_path / 'kms.key'}", lambda _what, _share: None)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-1000])
    cases = [(tmp_path / "no.gguf", "No such model"), (embeds, "generates"), (cut, "is cut off"), (nan(model), "not numbers"),
             (sealed, "is sealed")]  # fmt: skip
    for path, said in cases:
        with pytest.raises(SettingsError, match=said):
            refused(path, model, text)
        with pytest.raises(SettingsError, match=said):
            refused(model, path, text)


def nan(model: Path) -> Path:
    """A copy in which the last weight is not a number."""
    path = model.with_name("nan.gguf")
    path.write_bytes(model.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    return path


def test_the_command_prints_a_table_or_json(tmp_path: Path, text: Path) -> None:
    arguments = ["compare", *[str(tiny_model(tmp_path / name)) for name in ("a.gguf", "b.gguf")], "--text", str(text)]
    printed = CliRunner().invoke(commands, [*arguments, "--json"])
    assert set(json.loads(printed.stdout)) == {*Compared.__slots__}
    table = CliRunner().invoke(commands, arguments)
    assert "same top" in table.stdout
    assert "B F32" in table.stdout
    assert "times as fast as A" in table.stdout
