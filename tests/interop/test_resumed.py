"""Broken answers that the npm package resumes, against the worker's real API over an echo, cut at every record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from lacre_backend.api.app import create_app
from parts.bent import flipped
from parts.echo_engine import EchoEngine
from parts.live import Gateway, serving
from parts.npm import install
from parts.relay import Relay

HERE = Path(__file__).resolve().parent
NODE, NPM = shutil.which("node"), shutil.which("npm")
SAID = "日本 and 😀"
Bend = Callable[[list[bytes]], list[bytes]]

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    install(HERE.parents[1] / "sdk" / "javascript")


async def asked(relay: Relay, home: Path, times: int = 1, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """So many chats of one program: what each of them told at its end, with its text; and the error that ended it."""
    async with serving(Gateway(relay)) as gateway:
        environment = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(home), "LACRE_URL": gateway.url, "LACRE_TOKEN": "t"}
        command = [str(NODE), "ask.mjs", json.dumps(options), '{"max_tokens": 400}', *[SAID] * times]
        done = await anyio.run_process(command, cwd=HERE, env=environment, check=False)
    totals, text = [], ""
    for line in map(json.loads, done.stdout.splitlines()):
        if "piece" in line:
            text += line["piece"]
        else:
            totals.append({**line, "text": text})
            text = ""
    assert not done.stderr.startswith(b"<"), done.stderr
    return totals, json.loads(done.stderr) if done.stderr else {}


def cutting(places: Sequence[int | None], kept: list[int]) -> Bend:
    """Leaves so many records of each answer in turn; None, and all answers after them: whole."""
    left = list(places)

    def bend(pieces: list[bytes]) -> list[bytes]:
        kept.append(len(pieces))
        place = left.pop(0) if left else None
        return pieces[:place]

    return bend


@pytest.mark.slow
async def test_wherever_it_is_cut(tmp_path: Path) -> None:
    """The seam shows in nothing but the usage: one id, each character once."""
    kept: list[int] = []
    relay = Relay(create_app([EchoEngine(name="tiny")]), bend=cutting([], kept))
    [whole], error = await asked(relay, tmp_path)
    assert (whole["text"], error) == (SAID, {})
    records = kept[0]
    relay.bend = cutting([place for cut in range(records) for place in (cut, None)], kept)
    all_of_them, error = await asked(relay, tmp_path, records)
    assert (len(all_of_them), error) == (records, {})
    for place, got in enumerate(all_of_them):
        assert (got["text"], got["names"]) == (SAID, 1)
        assert (got["info"]["attempts"], got["info"]["lost"]) == (2, 1)
        usage, used = got["usage"], whole["usage"]
        assert usage["completion_tokens"] == used["completion_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert (usage["prompt_tokens"] > used["prompt_tokens"]) == (place > 2), "the head and the role are no tokens"


async def test_two_lost_workers_are_enough(tmp_path: Path) -> None:
    relay = Relay(create_app([EchoEngine(name="tiny")]), bend=cutting([5, 5, None], []))
    totals, error = await asked(relay, tmp_path)
    assert (totals, error["error"]) == ([], "StreamBrokenError")
    assert len(relay.sealed) == 2


async def test_an_altered_answer_is_not_resumed(tmp_path: Path) -> None:
    relay = Relay(create_app([EchoEngine(name="tiny")]), bend=lambda pieces: [*pieces[:5], flipped(pieces[5])])
    totals, error = await asked(relay, tmp_path)
    assert (totals, error["error"], len(relay.sealed)) == ([], "AlteredError", 1)


async def test_nothing_is_resumed_if_the_caller_wants_that(tmp_path: Path) -> None:
    relay = Relay(create_app([EchoEngine(name="tiny")]), bend=cutting([5], []))
    _, error = await asked(relay, tmp_path, resume=0)
    assert (error["error"], len(relay.sealed)) == ("TruncatedError", 1)
