"""Every program in examples/, as a person runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parts.minilm import NAME

from .conftest import ran, served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


Run = Callable[..., str]


@pytest.fixture
def run(shell: dict[str, str]) -> Run:
    def run(program: str, *arguments: str, stdin: str = "") -> str:
        return ran([str(EXAMPLES / program), *arguments], shell, program, input=stdin)

    return run


def test_none_is_forgotten() -> None:
    """A program without a test here would rot."""
    text = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.rglob("*.py")]
    assert [name for name in names if f'"{name}.py"' not in text and f"{name}:app" not in text] == []


def test_translation(run: Run) -> None:
    assert run("translate.py", "French", stdin="Good.\n\n").strip()


def test_summary_of_a_long_text(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(f"Part {i}. The tide comes in, and it goes out again. " * 4 for i in range(4)))
    assert run("summarise.py", str(text), "--size", "500", "--tokens", "10").strip()


def test_dialogue(run: Run) -> None:
    said = run("dialogue.py", "8", stdin="Hello.\nAnd again.\n")
    first, second = re.findall(r"\((\d+) tokens read, (\d+) of them from the cache\)", said)
    assert int(second[0]) > int(first[0])  # the whole dialogue was read again,
    assert int(second[1]) > 0  # and most of it was there still


def test_free_generation_is_the_same_for_a_seed(run: Run) -> None:
    one, other = (run("write.py", "The sea", "--count", "2", "--tokens", "8") for _ in range(2))
    assert one == other
    assert re.match(r"1\. The sea.+\n+2\. The sea", one, re.DOTALL)


def test_extraction(run: Run) -> None:
    person = json.loads(run("extract.py", stdin="Ada Lovelace was born in London in 1815."))
    assert set(person) == {"name", "city", "born"} and isinstance(person["born"], int)


def test_search(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text(
        "The stock market fell sharply on Monday.\nA cat was sleeping on the warm mat.\nRain is expected tomorrow.\n"
    )
    [found] = run("search.py", str(text), "where is the kitten?", "--model", NAME, "--count", "1").splitlines()
    assert "cat" in found and float(found.split()[0]) > 0.3


def test_distillation_asks_its_teacher(run: Run, tmp_path: Path) -> None:
    """tests/heavy/convert trains the student: there is PyTorch."""
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("What is rain?\n\nWhat is snow?\n")
    told = run("distill.py", "ask", str(prompts), "--out", str(answers), "--max-tokens", "4")
    assert told.startswith("2 answers of smollm2-135m in ")
    asked = [json.loads(line)["messages"] for line in answers.read_text().splitlines()]
    assert [[turn["role"] for turn in turns] for turns in asked] == [["user", "assistant"]] * 2
    assert [turns[0]["content"] for turns in asked] == ["What is rain?", "What is snow?"]
    assert all(turns[1]["content"] for turns in asked) and answers.stat().st_mode & 0o077 == 0


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_web_app_streams_to_a_browser(shell: dict[str, str]) -> None:
    with served("app:app", EXAMPLES / "web", shell) as web:
        page = web.get("/")
        assert page.headers["content-type"].startswith("text/html") and "<form>" in page.text
        with web.stream("POST", "/ask", json={"text": "Tell me a long story about the sea.", "max_tokens": 12}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            told = list(events(answer.iter_lines()))
        assert {name for name, _data in told[:-1]} == {"piece"} and len(told) > 4
        assert told[-1][0] == "done" and told[-1][1]["model"] == "smollm2-135m" and 4 <= told[-1][1]["tokens"] <= 12
        assert web.post("/ask", json={"text": ""}).status_code == 422
