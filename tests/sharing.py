"""How `pytest -n` shares the tests out between processes.

Rules:
- A file's tests stay in one process and in order: many share a server or a model that takes seconds to start.
- So do the files of a folder of `TOGETHER`, which share what takes longer. Those start before all others.
- `SPLIT` names the files that are too long for one process, and share nothing that takes time.
- The files of `LONGEST` start first: no process is left alone with one of them at the end.
- The files of `ALONE` load the whole machine, or measure how it does under load. They start when all others have ended.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final
from zlib import crc32

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

LONGEST: Final = (
    "tests/docs/test_runbooks.py",
    "tests/path/test_odd_surroundings.py",
    "tests/upgrade/test_rolling.py",
    "tests/path/test_routed_cluster.py",
    "tests/path/test_pool_under_load.py",
    "tests/path/test_resume.py",
    "tests/path/test_resume_calls.py",
    "tests/ecosystem/test_pythons.py",
    "tests/ecosystem/test_clients.py",
    "tests/path/test_budget_races.py",
    "tests/docs/test_blocks.py",
    "tests/test_bench.py",
    "tests/path/test_upstream.py",
    "tests/gateway/test_processes.py",
    "tests/gateway/test_policy_commands.py",
    "tests/gateway/test_whole_gateway.py",
    "tests/path/test_rotation.py",
    "tests/path/test_secrecy.py",
    "tests/hostile/test_mutations.py",
    "tests/path/test_deaths.py",
    "tests/fabric/test_super_cluster.py",
    "tests/ecosystem/test_programs.py",
    "tests/docs/test_examples.py",
    "tests/path/test_processes.py",
    "tests/backend/test_batching.py",
    "tests/backend/test_gemma.py",
    "tests/hostile/test_credentials.py",
    "tests/sdk/test_surroundings.py",
)
SPLIT: Final = ("tests/hostile/test_mutations.py", "tests/docs/test_runbooks.py", "tests/path/test_odd_surroundings.py")
PARTS: Final = 16  # of a split file
TOGETHER: Final = ("tests/heavy/convert",)
ALONE: Final = ("tests/chaos/test_chaos.py", "tests/hostile/test_running_site.py")


class Sharing(LoadScopeScheduling):
    """Hands each process whole files, the longest first, and at the end those of `ALONE` to the one that is left."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file in SPLIT:
            return f"{file} {crc32(nodeid.encode()) % PARTS}"
        folder = file.rpartition("/")[0]
        return folder if folder in TOGETHER else file

    def schedule(self) -> None:
        self.config.option.loadscopereorder = False  # else files with many tests come first, and `turn` counts for nothing
        super().schedule()

    def _assign_work_unit(self, node: WorkerController) -> None:
        ordered = sorted(self.workqueue, key=lambda scope: turn(scope.partition(" ")[0]))
        self.workqueue = OrderedDict((scope, self.workqueue[scope]) for scope in ordered)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if self._only_alone() and not node.shutting_down:
            if any(not other.shutting_down for other in self.nodes if other is not node):
                node.shutdown()
                return
            if len(self.nodes) > 1:  # others still run their last tests; `remove_node` comes back
                return
        super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        crashed = super().remove_node(node)
        if self._only_alone() and len(self.nodes) == 1:
            self._reschedule(self.nodes[0])
        return crashed

    def _only_alone(self) -> bool:
        return bool(self.workqueue) and all(scope in ALONE for scope in self.workqueue)


def turn(file: str) -> int:
    """The lower, the sooner a file or a folder starts."""
    if file in TOGETHER:
        return -1
    if file in ALONE:
        return len(LONGEST) + 1
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)
