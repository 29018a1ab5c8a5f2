"""NATS servers read new accounts: the files, the order to reload, and who is late.

Why the servers read their accounts twice, each time all of them (nats-server 2.15):
- A reload makes a new account without the subscriptions behind its imports. So its workers reach no queue, and requests get
  "nobody answers", although the reload said ok. The next reload makes these subscriptions.
- A server drops a subscription from another server for an account that it does not know yet, and nobody sends it again. So no
  gateway may listen to the new pool before every server knows the pool's account.

So the first accounts have the pool, but no listener to it, and the second ones are whole. A server that does not take the order
to reload can be restarted instead, one at a time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from lacre.errors import LacreError, SettingsError
from lacre.runtime.json_objects import object_in
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.nats import subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate import nats_conf
from lacre_fabric.operate.bundles import Bundles
from lacre_fabric.operate.fabric_check import server_reports
from lacre_fabric.operate.site import Site
from lacre_fabric.work.contract import FabricUnavailable

WAIT: Final = 60.0  # seconds for all servers to take new accounts; a mounted Secret may take longer
APPLY_LIMIT: Final = 300.0  # seconds for the operator's own command, which copies a file to a few machines
AGAIN: Final = 1.0  # seconds between two orders to reload
_RELOAD_LIMIT: Final = 5.0  # seconds for a server to read its configuration
_MAX_OUTPUT: Final = 500  # characters of a failed command that the error shows


class NotTaken(LacreError):
    """Some NATS servers did not take the new accounts in time. Every step so far may be repeated."""


@dataclass(frozen=True, slots=True)
class AccountFiles:
    """Where the accounts are written for the NATS servers, and how they get there.

    named: files that the servers include, or that `apply` brings to them. apply: a shell command to run after each writing.
    It has no terminal, and must end within `apply_limit` seconds.
    Without `named`, it is the bundle of NATS if there is one, or else `accounts.json` in the state folder.
    """

    named: tuple[Path, ...] = ()
    apply: str | None = None
    wait: float = WAIT
    apply_limit: float = APPLY_LIMIT

    def paths(self, site: Site) -> tuple[Path, ...]:
        if self.named:
            return self.named
        bundle = site.folder / "bundles" / "nats" / "lacre.conf"
        return (bundle if bundle.exists() else site.folder / "accounts.json",)

    def write(self, site: Site, unheard: Collection[str]) -> bool:
        """Whether the content changed. Raises SettingsError."""
        before = [_content(path) for path in self.paths(site)]
        if has_bundle(site):
            bundles(site).write_nats(unheard)
        content = nats_conf.encode({"accounts": accounts(site.replicated_roles(), unheard)})
        for path in self.paths(site) if self.named or not has_bundle(site) else ():
            try:
                write_secret(path.resolve(), content)
            except OSError as exc:
                raise SettingsError(f"{path} cannot be written ({exc.strerror}): correct --accounts") from exc
        return before != [_content(path) for path in self.paths(site)]

    async def applied(self) -> None:
        """Runs the operator's command. Raises SettingsError if it fails."""
        if self.apply is None:
            return
        with TemporaryFile() as output:  # no pipe: a child that stays would hold it open
            process = await asyncio.create_subprocess_shell(
                self.apply, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                async with asyncio.timeout(self.apply_limit):
                    await process.wait()
            except TimeoutError as exc:
                raise SettingsError(f"--apply: the command did not end within {self.apply_limit:.0f} s") from exc
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):  # it has just ended
                        os.killpg(process.pid, signal.SIGKILL)  # with its children
                    await process.wait()
            if process.returncode:
                output.seek(0)
                said = output.read().decode(errors="replace").strip()[-_MAX_OUTPUT:]
                raise SettingsError(f"--apply: the command ended with {process.returncode}: {said}")


async def teach(steps: Sequence[tuple[Site, Collection[str]]], files: AccountFiles) -> None:
    """Every server reads each of the accounts before any server reads the next.

    steps: a site, and pools that nobody listens to. Raises NotTaken, SettingsError or FabricUnavailable.
    """
    site = steps[0][0]
    async with connected(site, "inspector") as inspector, connected(site, "warden") as warden:
        known = await server_reports(inspector)
        needed = site.replicas * len(site.regions)
        if len(known) < needed:
            raise NotTaken(f"{len(known)} NATS servers answer, and {needed} are needed: start the others, then run this again")
        before = _digests(known)
        for each, unheard in steps:
            changed = files.write(each, unheard)
            await files.applied()
            before = await _reload(inspector, warden, before if changed else dict.fromkeys(before, ""), files, each)
        await _order(warden, await server_reports(inspector))  # for one that skipped a step of an interrupted command


async def _reload(
    inspector: Connection, warden: Connection, before: Mapping[str, str], files: AccountFiles, site: Site
) -> dict[str, str]:
    """Orders it until every server has other accounts than `before`. Returns what they have. Raises NotTaken."""
    deadline = time.monotonic() + files.wait
    while True:
        refused = await _order(warden, await server_reports(inspector))
        now = _digests(await server_reports(inspector))
        late = sorted(name for name, digest in before.items() if name not in now or (digest and now[name] == digest))
        if not late and not refused:
            return now
        if time.monotonic() >= deadline:
            told = "; ".join(refused) or f"the old accounts are still those of {', '.join(late)}"
            named = " and ".join(map(str, files.paths(site)))
            raise NotTaken(
                f"{told}. Bring {named} to every NATS server, have each read it (nats-server --signal reload, or a restart, "
                "one server after the other), then run this again"
            )
        await asyncio.sleep(AGAIN)


async def _order(warden: Connection, servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Has each server read its configuration again. Returns why servers refuse."""
    refused = []
    for server in servers:
        name, number = str(server.get("server_name", "?")), str(server.get("server_id", ""))
        try:
            async with warden.mapped():
                answer = await warden.client.request(subjects.reload(number), b"", timeout=_RELOAD_LIMIT)
        except FabricUnavailable as exc:
            refused.append(f"{name} takes no order to reload ({exc})")
            continue
        error = (object_in(answer.data) or {}).get("error")
        if error:
            said = error.get("description", error) if isinstance(error, dict) else error
            refused.append(f"{name} refuses the accounts ({str(said)[:_MAX_OUTPUT]})")
    return refused


def _digests(servers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By name, the digest of each server's configuration."""
    return {str(server.get("server_name", "?")): str(server.get("config_digest", "")) for server in servers}


@asynccontextmanager
async def connected(site: Site, role: str) -> AsyncIterator[Connection]:
    connection = await Connection.open(site.servers, site.credential(role))
    try:
        yield connection
    finally:
        await connection.close()


def has_bundle(site: Site) -> bool:
    return (site.folder / "bundles" / "nats" / "lacre.conf").exists()


def bundles(site: Site) -> Bundles:
    return Bundles(site, site.servers.urls[0] if len(site.servers.urls) == 1 else list(site.servers.urls), site.base_url)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read ({exc.strerror}): correct --accounts") from exc
