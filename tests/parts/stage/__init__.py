"""The path of a request, as much of it as a test asks for. This is the one door to it.

`Stage`         all in this process, and all real but the network: the fabric is in memory
`LiveStage`     over a real nats-server: gateways and workers are processes that may die
`EchoStage`     a `LiveStage` with one gateway that comes and goes, and nodes that echo
`ScriptedStage` a `LiveStage` for other people's programs: its engine says what it is told to, and `lacre proxy` stands in front

Each ends what it put up (`async with`, or `close`), and has a `token`, a `client`, and `entries` of the audit log. `on_air`
puts up a usual one.
"""

from parts.stage.echoing import ECHO, EchoStage, Kept
from parts.stage.in_process import Stage, Worker, running
from parts.stage.live import MODEL, TINY, LiveStage
from parts.stage.processes import GatewayProcess, WorkerProcess, busiest, launched, stopped, worker_settings
from parts.stage.scripted import SCRIPTED, Proxy, ScriptedStage
from parts.stage.settings import POOL, issuer_table, own_issuer, policies_with
from parts.waiting import until

__all__ = [
    "ECHO", "MODEL", "POOL", "SCRIPTED", "TINY", "EchoStage", "GatewayProcess", "Kept", "LiveStage", "Proxy", "ScriptedStage",
    "Stage", "Worker", "WorkerProcess", "busiest", "issuer_table", "launched", "own_issuer", "policies_with", "running",
    "stopped", "until", "worker_settings",
]  # fmt: skip
