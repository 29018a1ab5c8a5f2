"""What the clients send, trimmed, for tests/backend/test_recorded_bodies.py.

The tests of clients write it with `LACRE_RECORD=1`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ecosystem.clients import Client
from parts.stage import ScriptedStage

FOLDER: Final = Path(__file__).resolve().parents[1] / "backend/recorded"
RECORDING: Final = "LACRE_RECORD" in os.environ
_LONGEST: Final = 60  # characters of a text that is kept
_SCRIPT: Final = re.compile(r"\[\[(\w+)[^]]*\]\]")
_UNTRIED: Final = ("long", "slow", "")  # their answers take long, and nothing else is new in them
_OF_THIS_RUN: Final = ((re.compile(r"/\S*/project"), "/project"), (re.compile(r"zq7-kittiwake-\w+"), "kittiwake"))
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def keep(client: Client, live: ScriptedStage, since: int) -> None:
    """Writes what the client sent after the first `since` requests, each under its script's name."""
    if not RECORDING:
        return
    numbers: Counter[str] = Counter()
    kept: dict[str, Any] = {}
    for asked in live.scripted.asked()[since:]:
        name = _name(asked)
        if name not in _UNTRIED:
            numbers[name] += 1
            kept[f"{name}{numbers[name]}"] = {"path": asked["path"], "body": _trimmed(asked["body"])}
    lines = [f"{json.dumps(name)}: {json.dumps(asked)}" for name, asked in kept.items()]
    (FOLDER / f"{client.environment}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _name(asked: Mapping[str, Any]) -> str:
    """That of its script. Embeddings have none."""
    if asked["path"].endswith("/embeddings"):
        return "embeddings"
    return ["", *_SCRIPT.findall(json.dumps(asked["body"]))][-1]


def _trimmed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _trimmed(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_trimmed(each) for each in value]
    return _short(value) if isinstance(value, str) else value


def _short(text: str) -> str:
    """Without ids and paths of one run. It keeps the part that names a script."""
    for pattern, instead in _OF_THIS_RUN:
        text = pattern.sub(instead, text)
    text = _UUID.sub("00000000-0000-4000-8000-000000000000", text)
    if len(text) <= _LONGEST or text.startswith("{"):  # the arguments of a call
        return text
    scripts = [*_SCRIPT.finditer(text)]
    return text[scripts[-1].start() :][:_LONGEST] if scripts else text[: _LONGEST - 3] + "..."
