"""The logits at the end of prompts that several choices share. Each choice's first token is sampled from them.

Rules:
- A row is kept until all of its request's choices have ended: a choice that copies the prompt computes nothing to get it.
- The engine's lock protects it: any thread may add and remove tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

from lacre_backend.engine.context import Logits
from lacre_backend.engine.protocol import Task, TaskRefused


class _Group:
    __slots__ = ("members", "row", "task")

    def __init__(self, task: Task) -> None:
        self.task = task  # any of them: their prompts are the same
        self.members = 0
        self.row: Logits | None = None


class Rows:
    """Rows by `Task.group`."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, tasks: Sequence[Task]) -> None:
        """Adds all tasks, or none. Raises `TaskRefused` if a prompt or adapter differs from its group's."""
        first: dict[str, Task] = {}
        for task in tasks:
            if task.group is not None:
                known = self._groups.get(task.group)
                other = first.setdefault(task.group, task if known is None else known.task)
                if (other.prompt, other.begun, other.adapter) != (task.prompt, task.begun, task.adapter):
                    raise TaskRefused("The choices of one group must have the same prompt and adapter.", field="group")
        for task in tasks:
            if task.group is not None:
                self._groups.setdefault(task.group, _Group(task)).members += 1

    def remove(self, task: Task) -> None:
        if task.group is not None and (group := self._groups.get(task.group)) is not None:
            group.members -= 1
            if not group.members:
                del self._groups[task.group]

    def keep(self, task: Task, row: Logits) -> None:
        """row: a view; it is copied if another choice may need it."""
        group = None if task.group is None else self._groups.get(task.group)
        if group is not None and group.members > 1:
            group.row = row.copy()

    def of(self, task: Task) -> Logits | None:
        """A copy of the row, for a choice that copied the prompt. None if no sibling read it."""
        group = None if task.group is None else self._groups.get(task.group)
        return None if group is None or group.row is None else group.row.copy()
