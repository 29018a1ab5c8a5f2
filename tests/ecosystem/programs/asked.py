"""What the client programs beside this file ask for, and what they tell. Prints JSON: each feature's result, or its error.

The scripts are those of `parts/scripts.py`. A real model answers the same questions in its own words.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

MODEL = os.environ["MODEL"]
EMBEDDER = os.environ["EMBEDDER"]
KEY = os.environ["OPENAI_API_KEY"]
URL = os.environ["OPENAI_BASE_URL"]
PLAIN = "[[plain]] Name a sea, in a few words."
LONG = "[[long]] Tell of the waves."
SLOW = "[[slow]] Tell of the waves."
WEATHER = "[[weather]] How is the weather in Vienna?"
THINK = "[[think]] Are seas salt?"
MOOD = "[[mood]] How do you feel, and how many points do you give?"
TEXTS = ["a cat", "a kitten"]
GREEDY: dict[str, Any] = {"temperature": 0}  # so that a real model says the same each time
PIECES = 3  # that a program takes of an answer before it leaves


def weather(city: str) -> str:
    """Tells the weather in a city.

    Args:
        city: The city's name.
    """
    return f"sunny in {city}"


def streamed(pieces: list[str]) -> dict[str, Any]:
    return {"text": "".join(pieces), "pieces": len(pieces)}


def tell(*features: Callable[[], Any]) -> None:
    """Runs those that the command line names. Then the program lives until its stdin ends: so its own end closes no stream."""
    known = {feature.__name__.strip("_"): feature for feature in features}
    print(json.dumps({name: _done(known[name]) for name in sys.argv[1:]}), flush=True)
    sys.stdin.read()


def _done(feature: Callable[[], Any]) -> Any:
    try:
        found = feature()
        return asyncio.run(found) if inspect.iscoroutine(found) else found
    except Exception as error:  # noqa: BLE001 - told to the test, which fails by it
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
