"""A base model with one of its adapters, as a model of its own. It needs no llama.cpp: the base computes."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from lacre_backend.engine.protocol import Engine, Event, Grammar, ModelInfo, Task


def adapted_digest(base: str, adapter: str) -> str:
    """The digest of a base model with an adapter: SHA-256 of both digests, each with a line feed after it."""
    return "sha256:" + hashlib.sha256(f"{base}\n{adapter}\n".encode()).hexdigest()


def adapted_name(model: str, adapter: str) -> str:
    """The name of a base model with an adapter."""
    return f"{model}:{adapter}"


class AdaptedEngine:
    """An `Engine`: a base engine with one of its adapters. The base's owner closes both. digest: of the adapter's file."""

    def __init__(self, base: Engine, adapter: str, digest: str, name: str) -> None:
        """digest: of the adapter's file. name: of the model that callers ask for."""
        self._base = base
        self.adapter = adapter
        self.digest = digest
        self.model: ModelInfo = replace(base.model, name=name, digest=adapted_digest(base.model.digest, digest))

    @property
    def died(self) -> bool:
        return self._base.died

    @property
    def stuck(self) -> bool:
        return self._base.stuck

    def submit(self, task: Task) -> AsyncIterator[Event]:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        return self._base.submit_all([replace(task, adapter=self.adapter) for task in tasks])

    def cancel(self, task_id: str) -> None:
        self._base.cancel(task_id)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._base.tokenize(text, special)

    def speak(self, tokens: Sequence[int]) -> None:
        self._base.speak(tokens)
        self.model = replace(self.model, spoken_ids=self._base.model.spoken_ids)

    def released(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        return self._base.released(tokens, stop)

    async def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return await self._base.tokens(texts)

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        return self._base.grammar(source, begun)

    def close(self) -> None:
        """Does nothing: the base is still in use."""
