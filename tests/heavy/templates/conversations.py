"""Conversations that each template is given. Every text has a word that nothing else has: `WORD`."""

from __future__ import annotations

import re
from typing import Any, Final

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

WORD: Final = re.compile(r"w_[a-z]+")

_WHERE: Final = {"port": {"type": "string", "description": "Its name"}, "unit": {"type": "string", "enum": ["m", "ft"]}}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": _WHERE, "required": ["port"]}
    described = {"name": name, "description": "The tide at a port, é <now>", "parameters": parameters}
    return {"type": "function", "function": described}


TIDE, WAVES = tool("get_tide"), tool("get_waves")


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def calling(content: str, **calls: str) -> dict[str, Any]:
    """calls: the ports that tools are asked for, by the calls' ids."""
    asked = {call: {"name": "get_tide", "arguments": {"port": port, "unit": "m"}} for call, port in calls.items()}
    written = [{"id": call, "type": "function", "function": function} for call, function in asked.items()]
    return {"role": "assistant", "content": content, "tool_calls": written}


def result(call: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "name": "get_tide", "content": content}


SYSTEM: Final = said("system", "Be kind, w_system.\nSempre. ")
ASK: Final = said("user", "Olá w_ask 🌊 \"quoted\" <b> & 'that' \\ {{ x }}")
ANSWER: Final = said("assistant", "  It rises, w_answer.\n")
AGAIN: Final = said("user", "And w_again?")
TAGS: Final = (
    "<think> </think> <tool_call> <tool_response> <|im_end|>\n<|im_start|>system\n[/INST] </s> <|eot_id|> <end_of_turn>"
)
_TOLD: Final = result("call00001", "w_result")
_USED: Final = [ASK, calling("", call00001="w_port é"), result("call00001", "2 m w_result <b>")]
_DONE: Final = [*_USED, said("assistant", "Two metres, w_done."), AGAIN]

CONVERSATIONS: Final[dict[str, tuple[Messages, Tools]]] = {
    "a question": ([ASK], None),
    "after a system message": ([SYSTEM, ASK], None),
    "several turns": ([ASK, ANSWER, AGAIN], None),
    "several turns after a system message": ([SYSTEM, ASK, ANSWER, AGAIN], None),
    "many turns": ([SYSTEM, *([ASK, ANSWER] * 5), AGAIN], None),
    "two questions": ([ASK, AGAIN], None),
    "an answer at the end": ([ASK, ANSWER], None),
    "reasoning": ([ASK, said("assistant", "<think>\nHidden.\n</think>\n\nShown w_shown."), AGAIN], None),
    "reasoning apart": ([ASK, {**ANSWER, "reasoning_content": "Hidden.\n"}, AGAIN], None),
    "reasoning under another name": ([ASK, {**ANSWER, "reasoning": "Hidden."}, AGAIN], None),
    "reasoning at the end": ([ASK, {**ANSWER, "reasoning_content": "Hidden."}], None),
    "reasoning before a call": ([ASK, {**calling("", call00001="w_port"), "reasoning_content": "Hidden."}, _TOLD], [TIDE]),
    "what is null": ([{**ASK, "name": None}, {**ANSWER, "tool_calls": None, "reasoning_content": None}, AGAIN], None),
    "a later system message": ([ASK, ANSWER, SYSTEM, AGAIN], None),
    "other alphabets": ([said("user", "w_greek Ωμέγα, 日本語, العربية, \u200d\u00a0\u3000, 👩‍👩‍👧")], None),
    "tags in what is asked": ([said("user", f"w_before {TAGS} w_after"), ANSWER, AGAIN], None),
    "tags in a system message": ([said("system", f"w_before {TAGS} w_after"), ASK], None),
    "tags in a result": ([*_USED[:2], result("call00001", f"w_before {TAGS} w_after")], [TIDE]),
    "with a tool": ([ASK], [TIDE]),
    "with tools after a system message": ([SYSTEM, ASK], [TIDE, WAVES]),
    "a call and its result": (_USED, [TIDE]),
    "a call and its result after a system message": ([SYSTEM, *_USED], [TIDE, WAVES]),
    "a call that is over": (_DONE, [TIDE]),
    "a call without tools": ([SYSTEM, *_DONE], None),
    "words beside a call": ([ASK, calling("Let me see, w_beside.", call00001="w_port"), _TOLD], [TIDE]),
    "two calls": ([ASK, calling("", call00001="w_one", call00002="w_two"), _TOLD, result("call00002", "w_second")], [TIDE]),
}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


IN_PARTS: Final[dict[str, Messages]] = {
    "one part": [said("user", text("Olá w_one."))],
    "two parts": [said("user", text("Olá w_one.", "And w_two 🌊?"))],
    "parts of each role": [
        said("system", text("Be w_kind. ", "And w_brief.")),
        said("user", text("Olá w_one.")),
        said("assistant", text("Sim w_two,", " w_three.")),
        said("user", text("E w_four?\n", "w_five")),
    ],
}
