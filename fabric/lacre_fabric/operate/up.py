"""`lacre up`: a complete Lacre on one machine: keys, a private nats-server, a gateway and workers, each its own process."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import InvalidMessage, SettingsError
from lacre.runtime import file_locks, folders, tasks
from lacre_fabric import logs
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate import (
    behind,
    default_model,
    dev_issuer,
    floods,
    local_console,
    model_digests,
    model_routes,
    served_models,
    stores,
)
from lacre_fabric.operate.leash import PYTHON
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import KEPT_UP, Schedule, publish, upkeep
from lacre_fabric.operate.served_models import ServedModels
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.supervisor import Child, Supervisor
from lacre_fabric.work.presence import Presence

POOL: Final = "default"
ENV_RENEWAL: Final = dev_issuer.LIFETIME / 4  # seconds: a sourced token is good for most of a day
_ENV_AGAIN: Final = tasks.Restart("each renewal writes the whole file; its token is valid for most of a day")
START_TIMEOUT: Final = 120.0  # seconds for each worker; loading a large model takes time
ANSWER_TIMEOUT: Final = 2.0  # seconds for one request to `readyz`: another program may answer on the port

log = structlog.get_logger("lacre.up")


def default_state() -> Path:
    """The user's state folder: see `lacre.runtime.folders.state`. Raises SettingsError."""
    return folders.state()


async def until_signalled(coroutine: Coroutine[None, None, None]) -> int | None:
    """Cancels the coroutine on SIGINT or SIGTERM, so that it stops what it started. Returns the signal; None if there was
    none.
    """
    task = tasks.spawn("command", tasks.run(coroutine))
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        return came[0] if came else None
    return None


@dataclass(frozen=True, slots=True)
class Running:
    """The processes that `lacre up` started. console: the address of the operators' console; None if there is none."""

    site: Site
    base_url: str
    connection_string: str
    children: dict[str, Child]
    console: str | None


@asynccontextmanager
async def running(
    state: Path,
    port: int,
    models: Sequence[Path] = (),
    *,
    signers: Sequence[Path] = (),
    adapters: Mapping[str, Path] = served_models.NO_ADAPTERS,
    projector: Path | None = None,
    routes: Path | None = None,
    schedule: Schedule | None = None,
    kms: str | None = None,
    workers: int = 1,
    as_shipped: bool = False,
    tell: Callable[[str], None] = lambda _line: None,
) -> AsyncIterator[tuple[Running, Supervisor]]:
    """Starts everything, waits until it serves requests, and stops everything on exit. Main thread only.

    - state, models: absolute paths; models are GGUF files, the default model needs only its name. Default: the models in the
      state's settings, or the default model.
    - signers: public keys in PEM, one of which must have signed each model; default: those in the state's settings.
    - adapters: of the only model, by name, beside those in the state's settings. projector: of the only model, to read images.
    - routes: a file with all of them; None: unchanged.
    - port: 0 picks a free one.
    - schedule: for the pool keys. kms: the address of the key that wraps them, and the keys of sealed models; None: unchanged.
    - workers: their number in the pool. as_shipped: serves the default model's shipped file, not the type that is the fastest.
    - tell: gets a line about the default model, and one for each death and restart of a worker.

    The models are read first: a model that is refused leaves no new state. Raises SettingsError, ModelRefused, KmsError,
    ChildDied or FabricUnavailable.
    """
    check_state(state)
    supervisor = Supervisor(tell)
    with ExitStack() as stack:
        stack.enter_context(_only_one(state))
        served = served_models.chosen(Site(state, {}).worker_settings(POOL), models, signers, adapters, projector)
        site = _site(state, served)
        routed = None if routes is None else model_routes.read(routes, site.pools)
        beside = port + 1 if port else 0
        port = _free(port)
        if not as_shipped:
            served = replace(served, default=await _default(served, tell))
        if kms is not None:
            site.check_kms(kms)
        named = await _read_models(site, served, site.kms if kms is None else kms)
        if kms is not None:
            site.choose_kms(kms)
        site.create()
        async with site.changing():
            model_digests.record(site.models_file, POOL, named)
            if routed is not None:
                model_routes.record(site.folder, routed)
        logs.configure(stack.enter_context(site.log("up").open("a")))
        try:
            connection, children, console = await _start(site, supervisor, port, beside, served, workers)
            base_url = f"http://127.0.0.1:{port}"
            watched = partial(floods.watch, site.servers, site.credential("warden"))
            tending = [
                tasks.start("upkeep", partial(upkeep, site, connection, schedule or Schedule()), restart=KEPT_UP),
                tasks.start("floods", watched, restart=floods.WATCHED),
                tasks.start("env", partial(keep_env, site, base_url), restart=_ENV_AGAIN),
            ]
            try:
                site.write_env(base_url)
                yield Running(site, base_url, site.connection_string(base_url), children, console), supervisor
            finally:
                for each in tending:
                    await each.close()
                await connection.close()
        finally:
            supervisor.stop()


def check_state(state: Path) -> None:
    """Raises SettingsError for a name that settings files cannot contain: TOML and JSON are Unicode."""
    try:
        str(state).encode()
    except UnicodeEncodeError:
        raise SettingsError(
            f"the state folder {str(state)!r} has a name that is not UTF-8: name another with --state"
        ) from None


def _site(state: Path, served: ServedModels) -> Site:
    """The state's site, with this machine's models. Raises SettingsError if its NATS servers run elsewhere."""
    site = Site.load_or_new(state, {POOL: served.names})
    if not site.is_of_one_machine:
        raise SettingsError(
            f"{state} belongs to a site whose NATS servers run elsewhere (site.json). `lacre up` would change that: choose "
            "another folder with --state"
        )
    return site


async def _default(served: ServedModels, tell: Callable[[str], None]) -> Path | None:
    """The file for the model without a path, if there is one. None: the shipped one."""
    if all("path" in table for table in served.tables):
        return None
    found = await default_model.fastest(tell)
    tell(found.told)
    return found.path


async def keep_env(site: Site, base_url: str, every: float = ENV_RENEWAL) -> None:
    """Renews the token in `env` while this runs. every: seconds."""
    while True:
        await asyncio.sleep(every)
        site.write_env(base_url)


async def _start(  # noqa: PLR0917 - the parts of one command
    site: Site, supervisor: Supervisor, port: int, beside: int, served: ServedModels, workers: int
) -> tuple[Connection, dict[str, Child], str | None]:
    """beside: the port for the operators' console, if it is free; 0: any."""
    nodes = [f"n{number}" for number in range(1, workers + 1)]
    server = NatsServer(site.folder / "nats", free_port())
    server.configure(site.roles(nodes))
    children = {"nats-server": supervisor.add(Child("nats-server", server.start(site.log("nats")), site.log("nats")))}
    new = not site.gateway_settings.exists()
    site.write_settings(server.url, port, {POOL: served.tables}, nodes, served.default)
    console = local_console.write(site.gateway_settings, beside, new=new)
    connection = await Connection.open(server.url, site.credential("provisioner"))
    try:
        await behind.check(site, connection)
        mark = await stores.provision_site(site, connection)
        if mark.lost:
            raise SettingsError(stores.unsettled(mark, site.folder))
        await publish(site, connection)
        present: set[str] = set()

        def came(subject: str, _block: bytes, payload: bytes) -> bool:
            with suppress(InvalidMessage):
                if Presence.parse(payload).models:  # without models it is present but cannot work yet
                    present.add(subjects.parse_presence(subject)[2])
            return True

        heard = await connection.client.subscribe_directly(subjects.presence(POOL, subjects.DEFAULT_REGION, "*"), came)
        await connection.client.flush()
        command = [*PYTHON, "-m", "lacre_gateway", "--settings", str(site.gateway_settings)]
        children["gateway"] = supervisor.start("gateway", command, site.log("gateway"))
        for node in nodes:  # one after the other: each takes its share of the memory that the earlier ones left
            name = "worker" if len(nodes) == 1 else f"worker-{node}"
            settings = site.worker_settings(POOL) if len(nodes) == 1 else site.node_settings(POOL, node)
            command = [*PYTHON, "-m", "lacre_backend", "--settings", str(settings)]
            children[name] = supervisor.start(name, command, site.log(name), again=True)
            await _ready(supervisor, children[name], partial(_heard, present, node))
        await _ready(supervisor, children["gateway"], partial(_answers, port))
        await heard.unsubscribe()  # a worker that floods presence must not break the connection that publishes keys
    except BaseException:
        await connection.close()
        raise
    return connection, children, console


async def _read_models(site: Site, served: ServedModels, kms: str) -> model_digests.Entries:
    """The digests of the files that the workers here will serve. Raises as `model_digests.read_served`."""
    path = site.worker_settings(POOL)
    if not served.tables:
        return {}
    return await model_digests.read_served(path, kms, served_models.planned(path, served.tables), served.default)


async def _ready(supervisor: Supervisor, child: Child, said: Callable[[], Awaitable[bool]]) -> None:
    """Waits until the child is ready. Raises ChildDied if any child dies, SettingsError if this one takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while not await said():
        supervisor.check()
        if time.monotonic() > deadline:
            raise SettingsError(f"the {child.name} was not ready within {START_TIMEOUT:.0f} s: see {child.log}")
        await asyncio.sleep(0.05)


async def _heard(present: Collection[str], node: str) -> bool:
    """Whether the worker has announced itself."""
    return node in present


async def _answers(port: int) -> bool:
    """Whether `GET /readyz` answers 200."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                return (await reader.readline()).startswith(b"HTTP/1.1 200")
            finally:
                writer.close()
    except (OSError, ValueError):  # ValueError: a first line without an end
        return False


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    """Locks the state: two processes would sign the same versions and corrupt the store. Raises SettingsError."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = file_locks.take(state / "lock", f"`lacre up` already runs on {state}: stop it, or use another --state")
    except OSError as exc:
        raise SettingsError(f"cannot keep state in {state} ({exc.strerror}): choose a folder of your own with --state") from exc
    try:
        yield
    finally:
        lock.release()


def _free(port: int) -> int:
    """The port if it is free; a free one for 0. Raises SettingsError."""
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            raise SettingsError(f"port {port} is taken ({exc.strerror}): stop its program, or use --port") from exc
    return port
