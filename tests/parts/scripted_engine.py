"""An engine that says what a script tells it to, byte by byte: a test double of the engine alone, behind the real API.

Everything around it is real: templates, parsing of calls, grammars' sources, sealing. It takes a grammar, and does not obey it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lacre_backend.engine.protocol import FinishReason, Grammar, Task
from parts.echo_engine import EchoEngine


@dataclass(frozen=True, slots=True)
class _Unheld:
    """A grammar that holds nothing."""

    begun: tuple[int, ...] = ()


class ScriptedEngine(EchoEngine):
    """script: from the prompt's text to the answer's. pause: from it to the seconds before each token, asked when a
    task begins. ended: is told why each task ended.
    """

    def __init__(
        self,
        script: Callable[[str], str],
        *,
        pause: Callable[[str], float] = lambda _: 0.0,
        ended: Callable[[FinishReason], object] = lambda _: None,
        **settings: Any,
    ) -> None:
        super().__init__(name="scripted", **settings)
        self._script = script
        self._pause = pause
        self._ended = ended

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        return _Unheld(begun)

    def _admit(self, task: Task) -> None:
        """Any task with a grammar."""

    def _answer(self, prompt: tuple[int, ...]) -> Iterator[int]:
        yield from self._script(_text(prompt)).encode()

    def _wait(self, task: Task) -> float:
        return self._pause(_text(task.prompt))

    def _end(self, reason: FinishReason) -> None:
        self._ended(reason)


def _text(prompt: tuple[int, ...]) -> str:
    return bytes(token for token in prompt if token < 256).decode("utf-8", "replace")
