"""What a scripted engine says to a client: a prompt names one of these scripts, as `[[weather]]` or `[[edit OLD NEW]]`.

A script may have several answers: the next one is due when the results of the last one's calls are in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

PLAIN: Final = "The sea is salt."
THOUGHT: Final = "Most seas are salt, and a few are not."
# Each byte is a token: far more than 512, which once was the limit of an answer whose caller names none.
LONG: Final = " ".join(f"wave {number:03}" for number in range(200))
CITY: Final = "Vienna"
FELT: Final = {"mood": "good", "points": 3}
FILE: Final = "notes.txt"
PAUSE: Final = 0.02  # seconds a token of the slow script: its client has time to leave
_ORDER: Final = re.compile(r"\[\[(\w+)((?: [\w-]+)*)\]\]")
_RESULT: Final = "<tool_response>"
_OFFERED: Final = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)


def said(prompt: str) -> str:
    """The answer to a prompt: that of the last script that it names, `plain` if it names none."""
    name, words, since = _ordered(prompt)
    return _SCRIPTS[name](prompt, words, since)


def pause(prompt: str) -> float:
    """Seconds before each token."""
    return PAUSE if _ordered(prompt)[0] == "slow" else 0.0


def sunny(city: str) -> str:
    """What the programs' tool returns."""
    return f"sunny in {city}"


def patch(old: str, new: str) -> str:
    """A change of one line of `FILE`, in the form that Codex applies."""
    return f"*** Begin Patch\n*** Update File: {FILE}\n@@\n-{old}\n+{new}\n*** End Patch"


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """In the form that the API teaches models without one of their own."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def _ordered(prompt: str) -> tuple[str, str, str]:
    """The script's name, its words, and the prompt from there on."""
    found = [*_ORDER.finditer(prompt)]
    return (found[-1][1], found[-1][2].strip(), prompt[found[-1].end() :]) if found else ("plain", "", "")


def _offered(prompt: str) -> list[str]:
    """The names of the tools."""
    listed = _OFFERED.search(prompt)
    return [json.loads(line)["function"]["name"] for line in listed[1].splitlines()] if listed else []


def _final(prompt: str, text: str) -> str:
    """A last answer, through the tool that takes it where an agent has one."""
    return call("final_answer", {"answer": text}) if "final_answer" in _offered(prompt) else text


def _plain(prompt: str, _words: str, _since: str) -> str:
    return _final(prompt, PLAIN)


def _long(prompt: str, _words: str, _since: str) -> str:
    return _final(prompt, LONG)


def _think(_prompt: str, _words: str, _since: str) -> str:
    return f"<think>\n{THOUGHT}\n</think>\n\n{PLAIN}"


def _weather(prompt: str, _words: str, since: str) -> str:
    if sunny(CITY) in since:  # some agents write results as what a user says
        return _final(prompt, f"It is {sunny(CITY)}.")
    return "The tool told nothing." if _RESULT in since else call("weather", {"city": CITY})


def _mood(prompt: str, _words: str, _since: str) -> str:
    """As JSON, or through the tool that a client made for it."""
    offered = _offered(prompt)
    return call(offered[-1], FELT) if offered else json.dumps(FELT)


def _edit(_prompt: str, words: str, since: str) -> str:
    """Reads the file, changes it, and tells."""
    old, new = words.split()
    commands = [f"cat {FILE}", f"apply_patch <<'EOF'\n{patch(old, new)}\nEOF\n"]
    done = since.count(_RESULT)
    return call("exec_command", {"cmd": commands[done]}) if done < len(commands) else f"The file says {new}."


_SCRIPTS: Final[Mapping[str, Callable[[str, str, str], str]]] = {
    "plain": _plain,
    "long": _long,
    "slow": _long,
    "think": _think,
    "weather": _weather,
    "mood": _mood,
    "edit": _edit,
}
