"""A task inside the engine, from its submission to its end: its tokens, its sampler, its text and its limits.

Rules:
- Only the decode thread uses a job, except `cancelled`, which any thread may set.
"""

from __future__ import annotations

from typing import Final

from lacre_backend.engine.context import Logits
from lacre_backend.engine.delivery import TaskStream
from lacre_backend.engine.drafting import MAX_DRAFT, Wanted
from lacre_backend.engine.masks import Compiled, Constraint, Masks
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import Alternative, Finish, FinishReason, PromptProgress, Task, TaskRefused, Token
from lacre_backend.engine.sampling import Sampler, logprob
from lacre_backend.engine.text import TextStream
from lacre_backend.engine.tokens import Tokens

_TELL_EACH: Final = 128  # tokens of a prompt between progress events: one per step would slow the steps down


class EngineJob:
    """limit: tokens to generate: the requested number, at most what the context has room for."""

    def __init__(self, task: Task, stream: TaskStream, sampler: Sampler, text: TextStream, limit: int) -> None:
        self.task = task
        self.tokens = Tokens(task.prompt, task.begun, chained=task.cache_scope is not None)
        self.stream = stream
        self.sampler = sampler
        self.limit = limit
        self.text = text
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.told = 0  # prompt tokens already reported as read
        self.cancelled = False
        self.ended = False
        self.deadline: float | None = None

    def wanted(self) -> Wanted:
        """For speculation. The last token of an answer needs no guess after it."""
        able = self.sampler.constraint is None and self.sampler.given is None
        left = min(self.limit - self.completion_tokens - 1, MAX_DRAFT)
        return Wanted(self.task.id, self.tokens, left if able else 0, able)

    @property
    def lacks_tokens(self) -> bool:
        """Whether there are tokens left to generate."""
        return self.limit > 0 and not self.text.stopped

    def start(self, cached_tokens: int, now: float) -> None:
        """It is admitted, perhaps not for the first time. cached_tokens: of its prompt."""
        self.cached_tokens = cached_tokens
        if self.deadline is None and self.task.time_limit is not None:
            self.deadline = now + self.task.time_limit

    def progress(self, read: int) -> PromptProgress | None:
        """What to tell after so many tokens of the prompt. Nothing while a task that lost its cells reads its prompt again."""
        if self.completion_tokens or read < self.told + _TELL_EACH:
            return None
        self.told = read
        return PromptProgress(read, self.cached_tokens)

    def interrupted(self, now: float) -> FinishReason | None:
        """The reason to stop between two steps, if any."""
        if self.cancelled or self.stream.abandoned:
            return "cancelled"
        if self.deadline is not None and now >= self.deadline:
            return "length"
        return None

    def said(self, model: Model, token: int, logits: Logits) -> Token:
        """The event of one more token of the answer. logits: those it was chosen from."""
        raw = model.piece(token)
        self.completion_tokens += 1
        chosen: float | None = None
        top: tuple[Alternative, ...] = ()
        if self.task.logprobs is not None:
            chosen, top = logprob(model, logits, token, self.task.logprobs)
        return Token(token, self.text.push(raw), raw, chosen, top, self.cached_tokens)

    def finish(self, reason: FinishReason) -> Finish:
        text = "" if self.text.stopped else self.text.flush()
        if self.text.stopped and reason == "length":
            reason = "stop"
        return Finish(reason, len(self.task.sequence), self.cached_tokens, self.completion_tokens, text, self.text.matched)


def begin(task: Task, stream: TaskStream, model: Model, masks: Masks) -> EngineJob:
    """A job for the task. stream: takes its events. Its sampler must be closed. Raises EngineError or TaskRefused."""
    limit = min(task.max_tokens, model.info.n_ctx - len(task.sequence))
    constraint = _constraint(task, masks)
    text = TextStream(task.stop)
    sampler = Sampler(model, task.sampling, len(task.begun) + limit, constraint, task.given)
    text.begin(map(model.piece, task.begun))
    sampler.begin(task.begun)
    return EngineJob(task, stream, sampler, text, limit)


def _constraint(task: Task, masks: Masks) -> Constraint | None:
    grammar = task.sampling.grammar
    if grammar is None:
        return None
    compiled = masks.compile(grammar, task.begun) if isinstance(grammar, str) else grammar
    if not isinstance(compiled, Compiled) or compiled.begun != task.begun:
        raise TaskRefused("The grammar was made by another engine, or for another beginning.", field="grammar")
    return masks.constrain(compiled)
