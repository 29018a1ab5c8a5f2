"""`lacre demo`: runs one sealed chat through everything, and shows the request beside what the gateway saw of it.

With `--web` it serves the chat page instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final, cast

import httpx2
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import lacre
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.supervisor import GRACE, ChildDied
from lacre_fabric.operate.up import Running, running

PROMPT: Final = "I want to leave my job. In two sentences, how do I tell my boss?"
MAX_TOKENS: Final = 128
USER: Final = "ada@example.com"
WORKERS: Final = 2  # of the chat page: if one ends in the middle of an answer, the other one resumes it
_SHOWN: Final = 128  # bytes of ciphertext


@dataclass(frozen=True, slots=True)
class Result:
    """The output of `--json`. ttft_ms: milliseconds to the first text. tokens_per_s: between the first and the last text."""

    ok: bool
    model: str
    text: str
    completion_tokens: int
    ttft_ms: float
    tokens_per_s: float
    kem: str
    sealed_request_bytes: int


class _Tap(httpx2.AsyncBaseTransport):
    """The connection to the gateway. It keeps the last request and the audit proof of its answer."""

    def __init__(self) -> None:
        self._inner = httpx2.AsyncHTTPTransport()
        self.last: httpx2.Request | None = None
        self.audit = ""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.last = request
        response = await self._inner.handle_async_request(request)
        self.audit = response.headers.get(audit_proof.HEADER, "")
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def demo(out: Console, *, as_shipped: bool = False) -> Result:
    """Starts everything in a temporary state, runs and shows one chat, and stops everything. as_shipped: see `running`."""

    def tell(line: str) -> None:
        out.print(Text(line, style="dim"))

    with tempfile.TemporaryDirectory(prefix="lacre-demo-") as folder:
        out.print("[dim]Starting nats-server, a gateway and a worker with the model …[/dim]")
        async with running(Path(folder) / "state", 0, as_shipped=as_shipped, tell=tell) as (live, _):
            tap = _Tap()
            token = live.site.token(USER)
            memory = lacre.VersionMemory()
            async with lacre.AsyncClient(live.connection_string, token=token, memory=memory, transport=tap) as client:
                return await _ask(client, tap, live, out)


async def page(out: Console, *, as_shipped: bool = False) -> None:
    """Starts everything in a temporary state, prints the link of the chat page, and runs until it is cancelled.

    Raises ChildDied, and what `running` raises.
    """
    with tempfile.TemporaryDirectory(prefix="lacre-demo-") as folder:
        out.print(f"[dim]Starting nats-server, a gateway and {WORKERS} workers with the model …[/dim]")
        state = Path(folder) / "state"
        tell = partial(out.print, style="dim", markup=False)
        async with running(state, 0, workers=WORKERS, as_shipped=as_shipped, tell=tell) as (live, supervisor):
            with _proxy(live, Path(folder)) as said:
                if not (line := await asyncio.to_thread(said.readline)):
                    raise ChildDied("lacre proxy ended: its own message says why")
                out.print("The chat page. This link works once; Ctrl-C ends everything:")
                out.print(json.loads(line)["page"], markup=False, soft_wrap=True)
                await supervisor.watch()


@contextmanager
def _proxy(live: Running, folder: Path) -> Iterator[IO[bytes]]:
    """The output of `lacre proxy --open`, as the demo's user, which opens no browser. Its state is in `folder`."""
    own = {"LACRE_URL": live.connection_string, "LACRE_TOKEN": live.site.token(USER), "XDG_STATE_HOME": str(folder / "user")}
    command = leashed([*PYTHON, "-m", "lacre", "proxy", "--port", "0", "--open", "--no-browser", "--json"])
    with subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield cast("IO[bytes]", process.stdout)
        finally:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


async def _ask(client: lacre.AsyncClient, tap: _Tap, live: Running, out: Console) -> Result:
    began = time.perf_counter()
    arrivals: list[float] = []
    async with client.chat_stream(PROMPT, max_tokens=MAX_TOKENS, temperature=0) as stream:
        async for text in stream:
            arrivals.append(time.perf_counter())
            if len(arrivals) == 1:
                _show(out, tap)
            out.out(text, end="")
            out.file.flush()
    out.print()
    seconds = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else 0.0
    completion_tokens, facts = (await stream.reply()).usage.completion, stream.facts
    result = Result(
        ok=bool(arrivals),
        model=live.site.pools["default"][0],
        text=stream.text,
        completion_tokens=completion_tokens,
        ttft_ms=round((arrivals[0] - began) * 1e3, 1) if arrivals else 0.0,
        tokens_per_s=round((completion_tokens - 1) / seconds, 1) if seconds else 0.0,
        kem="" if facts is None else facts.kem,
        sealed_request_bytes=0 if facts is None else facts.sealed_request_bytes,
    )
    out.print(
        f"\n[dim]{result.completion_tokens} tokens, {result.tokens_per_s} a second, the first after {result.ttft_ms:.0f} ms; "
        f"sealed with {result.kem}, {result.sealed_request_bytes} bytes.[/dim]"
    )
    return result


def _show(out: Console, tap: _Tap) -> None:
    """Shows the application's request on the left, the gateway's view on the right, and the gateway's audit entry below."""
    if tap.last is None:
        return
    headers = "\n".join(f"{name}: {value}" for name, value in tap.last.headers.items() if name.startswith("lacre-"))
    content = tap.last.content
    seen = f"{headers}\n\n{content[:_SHOWN].hex(' ', 2)} … {len(content)} bytes"
    sides = Table.grid(expand=True, padding=(0, 1))
    sides.add_column(ratio=1)
    sides.add_column(ratio=1)
    sides.add_row(
        Panel(Text(PROMPT), title="you asked", border_style="green"),
        Panel(Text(seen), title="the gateway saw", border_style="red"),
    )
    out.print(sides)
    if tap.audit:  # the client has already verified it
        proof = AuditProof.parse_header(tap.audit)
        line = json.dumps(proof.members)  # with spaces, so that the terminal can break it
        title = f"and wrote into its audit log, as entry {proof.index}, which it proves with the answer"
        out.print(Panel(Text(line), title=title, border_style="red"))
    out.print("[bold]The answer, opened here record by record:[/bold]")


def as_json(result: Result) -> str:
    return json.dumps(asdict(result))
