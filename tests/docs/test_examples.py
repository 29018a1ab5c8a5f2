"""Every program in examples/, as a person runs it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from parts.minilm import NAME

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def run(shell: dict[str, str]):  # type: ignore[no-untyped-def]
    def run(program: str, *arguments: str, stdin: str = "") -> str:
        command = [sys.executable, "-W", "error", str(EXAMPLES / program), *arguments]
        done = subprocess.run(command, check=False, env=shell, capture_output=True, text=True, input=stdin, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_none_is_forgotten() -> None:
    """A program without a test here would rot."""
    text = Path(__file__).read_text()
    assert [
        path.stem for path in EXAMPLES.rglob("*.py") if f'"{path.name}"' not in text and f"{path.stem}:app" not in text
    ] == []


def test_translation(run) -> None:  # type: ignore[no-untyped-def]
    assert run("translate.py", "French", stdin="Good.\n\n").strip()


def test_summary_of_a_long_text(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(f"Part {i}. The tide comes in, and it goes out again. " * 4 for i in range(4)))
    assert run("summarise.py", str(text), "--size", "500", "--tokens", "10").strip()


def test_dialogue(run) -> None:  # type: ignore[no-untyped-def]
    said = run("dialogue.py", "8", stdin="Hello.\nAnd again.\n")
    first, second = re.findall(r"\((\d+) tokens read, (\d+) of them from the cache\)", said)
    assert int(second[0]) > int(first[0])  # the whole dialogue was read again,
    assert int(second[1]) > 0  # and most of it was there still


def test_free_generation_is_the_same_for_a_seed(run) -> None:  # type: ignore[no-untyped-def]
    one, other = (run("write.py", "The sea", "--count", "2", "--tokens", "8") for _ in range(2))
    assert one == other
    assert re.match(r"1\. The sea.+\n+2\. The sea", one, re.DOTALL)


def test_extraction(run) -> None:  # type: ignore[no-untyped-def]
    person = json.loads(run("extract.py", stdin="Ada Lovelace was born in London in 1815."))
    assert set(person) == {"name", "city", "born"} and isinstance(person["born"], int)


def test_search(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "lines.txt"
    text.write_text(
        "The stock market fell sharply on Monday.\nA cat was sleeping on the warm mat.\nRain is expected tomorrow.\n"
    )
    [found] = run("search.py", str(text), "where is the kitten?", "--model", NAME, "--count", "1").splitlines()
    assert "cat" in found and float(found.split()[0]) > 0.3


@pytest.fixture
def web(shell: dict[str, str]) -> Iterator[httpx2.Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "--app-dir",
            str(EXAMPLES / "web"),
            "app:app",
            "--fd",
            str(listener.fileno()),
        ]
        process = subprocess.Popen([*command, "--log-level", "warning"], env=shell, pass_fds=[listener.fileno()])
        with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=280) as client:
            yield client
        process.terminate()
        process.wait(30)


def events(lines: Iterator[str]) -> Iterator[tuple[str, object]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_web_app_streams_to_a_browser(web: httpx2.Client) -> None:
    page = web.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<form>" in page.text
    with web.stream("POST", "/ask", json={"text": "Tell me a long story about the sea.", "max_tokens": 12}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer.iter_lines()))
    assert {name for name, _data in told[:-1]} == {"piece"} and len(told) > 4
    assert told[-1][0] == "done" and told[-1][1]["model"] == "smollm2-135m" and 4 <= told[-1][1]["tokens"] <= 12
    assert web.post("/ask", json={"text": ""}).status_code == 422
