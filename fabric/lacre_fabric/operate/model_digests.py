"""Which model files may be served, and what they are: `trust/models.json` of a state folder, which each manifest repeats.

    {"pools": {"default": {"models": {"smollm2-135m": {"sha256": ["…"], "signers": ["…"], "kind": "generate", …}}}}}

Rules:
- The publisher writes it, from files that it read itself or from answers of `lacre model verify --json`. Nothing that a worker
  announces gets in.
- A model that it does not name has no digest in the manifest: workers may serve any file under that name.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from lacre.cli.output import EXIT_CODES
from lacre.errors import InvalidMessage, SettingsError, VerificationError
from lacre.jose.claims import Members
from lacre.runtime.json_objects import parse_object
from lacre.trust.manifest import DESCRIPTION, DIGEST, ModelEntry, is_digest
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.supervisor import ChildDied

MAX_REPORT: Final = 2**20  # bytes of a `--json` answer; that of `lacre model inspect` has some thousand
_TAIL: Final = 2000  # characters of a failed child's last words
_ERROR: Final = "error: "  # begins what a command says of an error of ours
_HELPS: Final = "\nwhat helps: "

Entries = Mapping[str, ModelEntry]  # by model


def recorded(path: Path) -> dict[str, Entries]:
    """By pool; empty if there is no file. Raises SettingsError for a damaged one."""
    try:
        pools = Members.parse(path.read_bytes(), "it").named_objects("pools")
        return {name: _entries(pool) for name, pool in pools.items()}
    except FileNotFoundError:
        return {}
    except (OSError, InvalidMessage) as exc:
        raise SettingsError(
            f"{path} is damaged ({exc}): correct it, or remove it and name the models' digests again with "
            "`lacre manifest publish --model`"
        ) from exc


def record(path: Path, pool: str, entries: Entries) -> None:
    """Puts the entries in place of those that the pool has so far; none removes them. Raises SettingsError."""
    before = recorded(path)
    if before.get(pool, {}) == entries:
        return
    pools = {**before, pool: entries}
    content = {
        name: {"models": {model: entry.members() for model, entry in each.items()}} for name, each in pools.items() if each
    }
    write_secret(path, json.dumps({"pools": content}).encode())


def named(said: Iterable[str], models: Collection[str]) -> Entries:
    """The entries that a person names, each as `MODEL=FILE`. FILE: the answer of `lacre model verify --json`, or of another
    command of `lacre model` whose answer has a `digest`; or that of `lacre worker digests --json`, which an adapter needs.
    Several files of one model may all be served. models: of the pool.

    Raises SettingsError.
    """
    reports: dict[str, list[ModelEntry]] = {}
    for each in said:
        model = max((name for name in models if each.startswith(f"{name}=")), key=len, default=None)  # a name may have a `=`
        if model is None:
            raise SettingsError(
                f"--model {each}: write MODEL=FILE, with one of the pool's models: {', '.join(models) or 'none'}"
            )
        file = each[len(model) + 1 :]
        reports.setdefault(model, []).extend([_report(Path(file), model, models)] if file else [])
    return {model: _entry(each) for model, each in reports.items()}


def _entry(reports: Sequence[ModelEntry]) -> ModelEntry:
    """Of all files, described as the last one that is."""
    digests = dict.fromkeys(digest for each in reports for digest in each.sha256)
    signers = dict.fromkeys(signer for each in reports for signer in each.signers)
    described = next((each for each in reversed(reports) if each.is_described), ModelEntry())
    return replace(described, sha256=tuple(digests), signers=tuple(signers))


def merged(before: Entries, named: Entries) -> Entries:
    """The entries so far, with the named ones in place. Digests alone leave a model's description as it was."""
    kept = {
        model: entry if entry.is_described or model not in before else entry.described_as(before[model])
        for model, entry in named.items()
    }
    return {**before, **kept}


def _report(path: Path, model: str, models: Collection[str]) -> ModelEntry:
    try:
        with path.open("rb") as file:
            members = parse_object(file.read(MAX_REPORT), "it")
        if "models" in members:
            return _of_worker(path, members, model)
    except (OSError, InvalidMessage) as exc:
        raise SettingsError(f"{path} cannot be read ({exc}): make it with `lacre model verify FILE --key KEY --json`") from exc
    if model.rpartition(":")[0] in models:
        raise SettingsError(
            f"{path} is of one file, and {model} is an adapter, whose digest is that of two: make it with "
            "`lacre worker digests --settings worker.toml --json`"
        )
    digest, signer = members.get("digest"), members.get("signer")  # `signer` stands only in answers that verified it
    if not isinstance(digest, str) or not is_digest(digest):
        raise SettingsError(f"{path} has no `digest`: make it with `lacre model verify FILE --key KEY --json`")
    if signer is not None and not (isinstance(signer, str) and is_digest(DIGEST + signer)):
        raise SettingsError(f"{path} has a `signer` that is no id: make it with `lacre model verify FILE --key KEY --json`")
    said: dict[str, object] = {name: members[name] for name in DESCRIPTION if name in members}
    files = {"sha256": [digest.removeprefix(DIGEST)], "signers": [] if signer is None else [signer]}
    try:
        return ModelEntry.parse(Members(said | files, "it"))
    except InvalidMessage as exc:
        raise SettingsError(f"{path} describes its model wrongly ({exc}): correct {', '.join(said)}") from exc


def _of_worker(path: Path, members: Mapping[str, object], model: str) -> ModelEntry:
    """Of an answer of `lacre worker digests --json`. Raises SettingsError, or InvalidMessage."""
    found = _entries(Members(members, "it"))
    if model not in found:
        raise SettingsError(f"{path} does not name {model}, but {', '.join(found) or 'nothing'}")
    return found[model]


class ModelRefused(VerificationError):
    """A model that its settings do not allow: damaged, unsigned, or signed by another key."""

    remedy = SettingsError.remedy


async def read_served(settings: Path, kms: str, tables: Sequence[Mapping[str, object]], default: Path | None = None) -> Entries:
    """The digests of the files that a worker is about to serve, and their verified signers. A child process reads them,
    because only the backend can open every kind of model file. kms: the worker's. tables: its `[[models]]`. default: of the
    one without a path. settings: their file, from whose folder relative paths start; it need not exist.

    Raises ModelRefused or SettingsError with the child's reason, or ChildDied.
    """
    planned = {"kms": kms, "models": tables, "default_model": None if default is None else str(default)}
    command = leashed([*PYTHON, "-m", "lacre_backend", "digests", "--settings", str(settings), "--planned", "--json"])
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        said, complaint = await process.communicate(json.dumps(planned).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return _entries(Members.parse(said, "the worker's digests"))
    told = complaint.decode(errors="replace").strip()[-_TAIL:]
    if not told.startswith(_ERROR):
        raise ChildDied(f"worker ended with status {process.returncode} while it read its models:\n{told}")
    kind = ModelRefused if process.returncode == EXIT_CODES[VerificationError] else SettingsError
    raise kind(told.removeprefix(_ERROR).replace(_HELPS, ". "))


def _entries(members: Members) -> Entries:
    return {name: ModelEntry.parse(entry) for name, entry in members.named_objects("models").items()}
