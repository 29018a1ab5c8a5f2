"""What the first choice of a stream has said so far, read event by event.

Rules:
- Of every API the text is kept, of a chat also the reasoning and the calls.
- Nothing is checked here: what has another form than OpenAI's, or is more than that, makes it `partly`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_REASONING: Final = ("reasoning_content", "reasoning")  # one text, under both names that clients read
_TOLD: Final = frozenset({"role", "content", "tool_calls", *_REASONING})  # members of a delta that `delta` has too


class FirstChoice:
    """partly: whether a chat had more to say than `delta` can: other choices, log probabilities, or unknown members."""

    def __init__(self, delta: Mapping[str, Any] | None = None) -> None:
        """delta: what was said before, as `delta` gives it."""
        self.partly = False
        self._texts: dict[str, list[str]] = {"content": []}
        self._calls: dict[int, tuple[dict[str, Any], list[str]]] = {}  # by index: id and name, and pieces of the arguments
        if delta is not None:
            self._add(delta)

    @property
    def text(self) -> str:
        return "".join(self._texts["content"])

    @property
    def delta(self) -> dict[str, Any]:
        """All of it as one delta of a chat."""
        said: dict[str, Any] = {"role": "assistant", **{name: "".join(texts) for name, texts in self._texts.items()}}
        calls = [
            {"index": index, **opened, "function": {"name": opened["function"]["name"], "arguments": "".join(arguments)}}
            for index, (opened, arguments) in sorted(self._calls.items())
        ]
        return said | ({"tool_calls": calls} if calls else {})

    def add(self, event: Mapping[str, Any]) -> None:
        """event: the object of one event of a chat, a text completion, `/v1/responses` or `/v1/messages`."""
        choices = choices_of(event)
        choice = next((each for each in choices if each.get("index", 0) == 0), None)
        self.partly = self.partly or len(choices) > 1 or any(map(_is_more, choices))
        delta = event.get("delta") if choice is None else choice.get("delta", choice)
        if isinstance(delta, str) and event.get("type") == "response.output_text.delta":
            self._texts["content"].append(delta)
        elif isinstance(delta, dict):
            self._add(delta)

    def _add(self, delta: Mapping[str, Any]) -> None:
        for name in (*_REASONING, "content"):
            if isinstance(said := delta.get(name), str):
                self._texts.setdefault(name, []).append(said)
        if isinstance(said := delta.get("text"), str):
            self._texts["content"].append(said)
        for index, call in _calls(delta):
            function = call["function"]
            opened = {"id": call.get("id"), "type": "function", "function": {"name": function.get("name")}}
            _, arguments = self._calls.setdefault(index, (opened, []))
            if isinstance(said := function.get("arguments"), str):
                arguments.append(said)


def _is_more(choice: Mapping[str, Any]) -> bool:
    """Whether `FirstChoice.delta` lacks something that the choice says."""
    delta = choice.get("delta")
    if choice.get("index", 0) != 0 or choice.get("logprobs") or not isinstance(delta, dict):
        return True
    return any(value for name, value in delta.items() if name not in _TOLD)


def choices_of(event: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Those of a chat's or a text completion's event."""
    choices = event.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _calls(delta: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each call in a chat's delta, with its index."""
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict) and isinstance(call.get("function"), dict) and isinstance(call.get("index"), int):
            yield call["index"], call
