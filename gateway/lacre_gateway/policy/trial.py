"""Tries a rule set in another process, before a gateway activates it.

Cedar's parser is recursive machine code: a file with some thousand brackets ends the process that parses it, without an
exception to catch. Here that process is a child, with less stack than the gateway has.

`python -m lacre_gateway.policy.trial FOLDER` writes one JSON object: the set's digest, or its fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Final

from lacre.runtime import tasks
from lacre_fabric.operate.leash import PYTHON
from lacre_gateway.policy.cedar import SYNTAX, PolicyError

UNTRIED: Final = "untried"  # the machine's fault, not the set's: to be tried again
_STACK: Final = 1 << 20  # bytes; a gateway's threads have 8 MiB
_LIMIT: Final = 60.0  # seconds; real sets take far less than one, and a busy machine gets more


async def try_out(folder: Path) -> str:
    """The digest of the set that passed. Raises PolicyError."""
    command = [*PYTHON, "-m", __name__, str(folder)]
    try:
        trial = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError as exc:
        raise PolicyError(UNTRIED, "", f"cannot start a process to try them ({exc.strerror})") from exc
    try:
        async with asyncio.timeout(_LIMIT):
            said, _ = await trial.communicate()
        found = json.loads(said)
    except TimeoutError as exc:
        raise PolicyError(UNTRIED, "", f"reading them took more than {_LIMIT:.0f} s") from exc
    except ValueError as exc:
        raise PolicyError(
            SYNTAX, "", "reading them crashes the process: look for expressions that are nested too deep"
        ) from exc
    finally:
        with contextlib.suppress(ProcessLookupError):
            trial.kill()
        await trial.wait()
    if "digest" not in found:
        raise PolicyError(found["fault"], found["place"], found["why"])
    return str(found["digest"])


def _tried(folder: Path) -> dict[str, str]:
    from lacre_gateway.policy.rules import RuleSet  # noqa: PLC0415 - only the child needs it, and the parent imports this file

    try:
        return {"digest": RuleSet.load(folder).digest}
    except PolicyError as exc:
        return {"fault": exc.fault, "place": exc.place, "why": exc.why}


def _main(folder: Path) -> None:
    tasks.thread("trial", lambda: print(json.dumps(_tried(folder))), stack=_STACK).join()  # noqa: T201 - for the parent


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
